# Shared by ./quickstart and ./test: what a Debian machine needs beside a Rust toolchain. Sourced, not run.

say() { printf '\n== %s\n' "$*"; }

# need COMMAND PACKAGE …: installs the packages whose commands are missing (a path is looked for as a file).
need() {
  local missing=()
  while [ $# -gt 0 ]; do
    case $1 in
      /*) [ -e "$1" ] || missing+=("$2") ;;
      *) command -v "$1" >/dev/null 2>&1 || missing+=("$2") ;;
    esac
    shift 2
  done
  [ ${#missing[@]} -eq 0 ] && return 0
  if [ "$(id -u)" != 0 ]; then
    echo "missing: ${missing[*]}; run this as root to have them installed" >&2
    return 1
  fi
  say "installing ${missing[*]}"
  # A package index that can't be refreshed (a third party's, say) matters only if the installation fails.
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null 2>&1 && return 0
  apt-get update -qq || true
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

need_basics() {
  if ! command -v cargo >/dev/null 2>&1; then
    [ -x "$HOME/.cargo/bin/cargo" ] && PATH=$HOME/.cargo/bin:$PATH
  fi
  command -v cargo >/dev/null 2>&1 || { echo "a Rust toolchain (cargo) is needed" >&2; return 1; }
  need /usr/lib/postgresql postgresql openssl openssl cc gcc g++ g++ ld binutils /usr/include/stdio.h libc6-dev ip iproute2 ping iputils-ping curl curl nsenter util-linux chrt util-linux \
    mke2fs e2fsprogs ssh openssh-client ssh-keygen openssh-client busybox busybox-static nft nftables perl perl
}

# What `mote-image build-debian` runs.
need_image_tools() {
  need mmdebstrap mmdebstrap zstd zstd xz xz-utils cpio cpio
}

# Programs and the conformance guest, into one target directory. With `--tests --examples` all that tests need, too, in one go: tests bring
# features of dependencies, and what is built before without them is built again.
build_all() {
  cargo build --release --workspace --bins "$@"
  cargo build -p mote-guest --no-default-features --features freestanding --profile guest
}
