#!/bin/sh
# build.sh STEP WORK OUT VARIANT: one step of the Debian image, run by `mote-image build-debian` as root. VARIANT is small or
# cloud-init.
set -eu
step=$1 work=$2 out=$3 variant=$4

# debootstrap VARIANT PACKAGES: Debian's root file system in $work/root, without what nobody reads in a guest.
debootstrap() {
  sources=$(grep -ls debian-archive-keyring /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list 2>/dev/null || true)
  [ -n "$sources" ] || { [ ! -s /etc/apt/sources.list ] || sources=/etc/apt/sources.list; }
  . /etc/os-release
  # shellcheck disable=SC2086
  mmdebstrap --quiet --mode=root --variant="$1" --include="$2" \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    "$VERSION_CODENAME" "$work/root" $sources
  rm -rf "$work"/root/var/cache/apt/* "$work"/root/var/lib/apt/lists/*
  rm -f "$work/root/etc/resolv.conf" "$work/root/etc/hostname"
}

# Only keys let in: no account has a password.
lock_root() {
  sed -i 's|^root:[^:]*:|root:*:|' "$work/root/etc/passwd"
  if [ -e "$work/root/etc/shadow" ]; then sed -i 's|^root:[^:]*:|root:*:|' "$work/root/etc/shadow"; fi
}

small_root() {
  debootstrap essential dropbear-bin,busybox-static,ca-certificates,e2fsprogs
  root=$work/root
  rm -f "$root/sbin/init"
  ln -s /bin/busybox "$root/sbin/init"
  for tool in poweroff reboot halt; do ln -sf /bin/busybox "$root/sbin/$tool"; done
  mkdir -p "$root/etc/mote"
  cp "$work/files/boot" "$work/files/fetch" "$work/files/udhcpc" "$root/etc/mote/"
  chmod 755 "$root/etc/mote/boot" "$root/etc/mote/udhcpc"
  cp "$work/files/inittab" "$root/etc/inittab"
  echo debian >"$root/etc/hostname"
  lock_root
  sed -i 's|^\(root:.*:\)/bin/bash$|\1/bin/sh|' "$root/etc/passwd"
}

# Debian with its init, OpenSSH and cloud-init; of cloud-init only what a distribution configures is configured.
cloud_init_root() {
  debootstrap minbase systemd-sysv,udev,cloud-init,cloud-guest-utils,openssh-server,iproute2,sudo,kmod,e2fsprogs
  root=$work/root
  lock_root
  # Each server makes its own.
  rm -f "$root"/etc/ssh/ssh_host_*
  : >"$root/etc/machine-id"
  echo 'LABEL=mote-debian / ext4 rw,errors=remount-ro 0 1' >"$root/etc/fstab"
  cat >"$root/etc/cloud/cloud.cfg.d/10_mote.cfg" <<'CFG'
# The locale that is there without being made; the kind of host key that every client takes and is made at once.
locale: C.UTF-8
ssh_genkeytypes: [ed25519]
# It boots without GRUB.
grub_dpkg: {enabled: false}
CFG
  chroot "$root" systemctl --quiet enable systemd-networkd
  # No packages are looked for in the background of every server, and what has nothing to do in a virtual machine isn't started.
  chroot "$root" systemctl --quiet disable apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer
  chroot "$root" systemctl --quiet mask proc-sys-fs-binfmt_misc.automount systemd-binfmt.service e2scrub_reap.service \
    systemd-pstore.service systemd-logind.service getty@tty1.service
  # Caches of /etc and /var are as new as the packages: nothing needs to make them at each server's first boot.
  touch "$root/etc/.updated" "$root/var/.updated"
  # The kernel's modules for what such a guest mounts: config drives and seeds (FAT, ISO 9660), and what systemd asks for.
  for tree in "$work"/kernel/lib/modules/* "$work"/kernel/usr/lib/modules/*; do
    [ -d "$tree/kernel" ] || continue
    to=$root/usr/lib/modules/$(basename "$tree")
    for directory in fs/fat fs/isofs fs/nls fs/autofs fs/configfs fs/fuse drivers/block/loop drivers/cdrom drivers/md/dm-mod drivers/char/hw_random drivers/ptp; do
      for from in "$tree/kernel/$directory" "$tree/kernel/$directory".ko*; do
        [ -e "$from" ] || continue
        mkdir -p "$to/kernel/$(dirname "$directory")"
        cp -r "$from" "$to/kernel/$(dirname "$directory")/"
      done
    done
    find "$to" -name '*.ko.xz' -exec xz -d {} +
    cp "$tree"/modules.builtin "$tree"/modules.builtin.modinfo "$tree"/modules.order "$to/"
    chroot "$root" depmod "$(basename "$tree")"
  done
}

case $step in
  kernel)
    package=$(apt-cache search --names-only '^linux-image-6\.12\..*-cloud-amd64-unsigned$' | cut -d' ' -f1 | sort -V | tail -1)
    [ -n "$package" ] || { echo "no linux-image-6.12…-cloud-amd64-unsigned in the package lists (apt-get update?)" >&2; exit 1; }
    mkdir -p "$work/deb" && chmod 755 "$work" "$work/deb"
    cd "$work/deb"
    apt-get -o APT::Sandbox::User=root download -qq "$package"
    dpkg -x "$package"_*.deb "$work/kernel"
    ;;
  modules)
    root=$work/initramfs
    mkdir -p "$root/bin" "$root/lib" "$root/dev" "$root/newroot"
    cp /bin/busybox "$root/bin/busybox"
    : >"$root/modules"
    for module in drivers/virtio/virtio_mmio drivers/block/virtio_blk net/core/failover drivers/net/net_failover drivers/net/virtio_net drivers/char/hw_random/rng-core drivers/char/hw_random/virtio-rng; do
      for file in "$work"/kernel/lib/modules/*/kernel/$module.ko "$work"/kernel/lib/modules/*/kernel/$module.ko.xz "$work"/kernel/usr/lib/modules/*/kernel/$module.ko "$work"/kernel/usr/lib/modules/*/kernel/$module.ko.xz; do
        [ -e "$file" ] || continue
        name=$(basename "$module").ko
        case $file in *.xz) xz -dc "$file" ;; *) cat "$file" ;; esac >"$root/lib/$name"
        echo "$name" >>"$root/modules"
        break
      done
    done
    grep -q virtio_blk "$root/modules" || { echo "the kernel package has no virtio_blk module where it is expected" >&2; exit 1; }
    cp "$work/files/initramfs-init" "$root/init"
    chmod 755 "$root/init"
    (cd "$root" && find . | sort | cpio -o -H newc -R 0:0 --quiet) >"$out/initrd.img"
    ;;
  root)
    case $variant in
      small) small_root ;;
      cloud-init) cloud_init_root ;;
      *) echo "unknown variant $variant" >&2; exit 2 ;;
    esac
    ;;
  disk)
    # Small, since every byte is hashed on its way to a host; the file system grows to the server's disk at boot.
    used_kib=$(du -sk "$work/root" | cut -f1)
    truncate -s "$(((used_kib * 5 / 4 / 1024 + 64) / 4 * 4))M" "$out/disk.raw"
    mke2fs -q -F -t ext4 -L mote-debian -m 0 -E lazy_itable_init=1,lazy_journal_init=1 -d "$work/root" "$out/disk.raw"
    ;;
  *)
    echo "unknown step $step" >&2
    exit 2
    ;;
esac
