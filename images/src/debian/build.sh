#!/bin/sh
# build.sh STEP WORK OUT: one step of the Debian image, run by `mote-image build-debian` as root.
set -eu
step=$1 work=$2 out=$3
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
    sources=$(grep -ls debian-archive-keyring /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list 2>/dev/null || true)
    [ -n "$sources" ] || { [ -s /etc/apt/sources.list ] && sources=/etc/apt/sources.list; }
    . /etc/os-release
    # shellcheck disable=SC2086
    mmdebstrap --quiet --mode=root --variant=essential --include=dropbear-bin,busybox-static,ca-certificates,e2fsprogs \
      --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
      "$VERSION_CODENAME" "$work/root" $sources
    root=$work/root
    rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/*
    rm -f "$root/sbin/init" "$root/etc/resolv.conf" "$root/etc/hostname"
    ln -s /bin/busybox "$root/sbin/init"
    for tool in poweroff reboot halt; do ln -sf /bin/busybox "$root/sbin/$tool"; done
    mkdir -p "$root/etc/mote"
    cp "$work/files/boot" "$work/files/fetch" "$work/files/udhcpc" "$root/etc/mote/"
    chmod 755 "$root/etc/mote/boot" "$root/etc/mote/udhcpc"
    cp "$work/files/inittab" "$root/etc/inittab"
    echo debian >"$root/etc/hostname"
    # Only keys let in: no account has a password.
    sed -i 's|^root:[^:]*:|root:*:|' "$root/etc/passwd"
    if [ -e "$root/etc/shadow" ]; then sed -i 's|^root:[^:]*:|root:*:|' "$root/etc/shadow"; fi
    sed -i 's|^\(root:.*:\)/bin/bash$|\1/bin/sh|' "$root/etc/passwd"
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
