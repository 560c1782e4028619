#!/bin/sh
# cloud-init.sh DISK WORK LINE STEPS…: runs Debian's cloud-init as a boot would in a copy of its root file system, in the
# network namespace that this is called in, in mount and host-name namespaces of its own. DISK is that of `mote-image
# build-debian --cloud-init`, LINE the kernel's command line as the guest sees it; WORK/seed goes to /var/lib/cloud/seed. The
# steps after `init --local` begin with the network up if there is DHCP. Prints what came of it, in sections `<<NAME`.
set -eu
disk=$1 work=$2 line=$3
root=$work/root
mkdir -p "$work/lower" "$work/rw" "$root"
mount -o ro,loop "$disk" "$work/lower"
mount -t tmpfs rw "$work/rw"
mkdir "$work/rw/upper" "$work/rw/work" "$work/rw/sys"
mount -t overlay -o "lowerdir=$work/lower,upperdir=$work/rw/upper,workdir=$work/rw/work" root "$root"
mount -t tmpfs -o mode=755 run "$root/run"
# None of the machine's disks is there, nor its firmware's tables: only what such a server's are.
mount -t tmpfs -o mode=755 dev "$root/dev"
for device in null:3 zero:5 random:8 urandom:9; do mknod -m 666 "$root/dev/${device%:*}" c 1 "${device#*:}"; done
mount -t proc proc "$root/proc"
mount -t sysfs sys "$work/rw/sys"
mount -t tmpfs -o mode=755 sys "$root/sys"
mkdir -p "$root/sys/devices" "$root/sys/class/net" "$root/sys/class/block" "$root/sys/class/dmi/id" "$root/sys/firmware"
mount --bind "$work/rw/sys/devices" "$root/sys/devices"
mount --bind "$work/rw/sys/class/net" "$root/sys/class/net"
cp "$work"/dmi/* "$root/sys/class/dmi/id/"
mkdir -p "$root/var/lib/cloud/seed"
if [ -d "$work/seed" ]; then cp -r "$work/seed/." "$root/var/lib/cloud/seed/"; fi
echo "$line" >"$root/run/cmdline"
inside() { chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin PATH_PROC_CMDLINE=/run/cmdline "$@"; }
inside /usr/lib/cloud-init/ds-identify --force >&2
inside cloud-init init --local >&2
# What systemd-networkd does with the network that was written.
if inside grep -qs '^DHCP=\(ipv4\|yes\)' /etc/systemd/network/10-cloud-init-eth0.network; then inside dhclient -1 eth0 >&2; fi
inside cloud-init init >&2
inside cloud-init modules --mode=config >&2
inside cloud-init modules --mode=final >&2
inside dhclient -x >&2 2>/dev/null || true
inside sh -c '
  section() { echo "<<$1"; shift; "$@" 2>&1 || true; }
  section source cloud-id
  section identified cat /run/cloud-init/cloud.cfg
  section instance cat /var/lib/cloud/data/instance-id
  section hostname hostname
  section marker cat /etc/marker
  section ran cat /run/ran
  section keys cat /home/debian/.ssh/authorized_keys
  section network cat /etc/systemd/network/10-cloud-init-eth0.network
  section result cat /var/lib/cloud/data/result.json
  section warnings grep -h -e WARNING -e ERROR -e Traceback /var/log/cloud-init.log
  echo "<<end"'
