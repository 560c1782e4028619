#!/bin/sh
# build.sh STEP WORK OUT VARIANT: one step of the microVM kernel, run by `mote-image build-kernel`. VARIANT is smp or up.
set -eu
step=$1 work=$2 out=$3 variant=$4
build=$work/build
case $step in
  source)
    mkdir -p "$work/deb" "$work/source" && chmod 755 "$work" "$work/deb"
    cd "$work/deb"
    apt-get -o APT::Sandbox::User=root download -qq linux-source-6.12 ||
      { echo "no linux-source-6.12 in the package lists (apt-get update?)" >&2; exit 1; }
    dpkg --fsys-tarfile linux-source-6.12_*.deb | tar -xO ./usr/src/linux-source-6.12.tar.xz | tar -xJ -C "$work/source" --strip-components=1
    rm -rf "$work/deb"
    ;;
  config)
    mkdir -p "$build"
    cat "$work/files/config" >"$work/wanted"
    if [ "$variant" = smp ]; then cat "$work/files/config-smp" >>"$work/wanted"; fi
    make -s -C "$work/source" O="$build" KCONFIG_ALLCONFIG="$work/wanted" allnoconfig
    # An option that didn't take effect is a mistake of the list, not something to find out in a guest.
    grep -v '^#' "$work/wanted" | grep . | grep -vxFf "$build/.config" >"$work/refused" || true
    if [ -s "$work/refused" ]; then
      echo "this source does not take: $(tr '\n' ' ' <"$work/refused")" >&2
      exit 1
    fi
    cp "$build/.config" "$out/config"
    ;;
  compile)
    make -s -C "$work/source" O="$build" -j"$(nproc)" vmlinux KCFLAGS=-w </dev/null
    strip -o "$out/vmlinux" "$build/vmlinux"
    ;;
  *)
    echo "unknown step $step" >&2
    exit 2
    ;;
esac
