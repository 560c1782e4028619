#!/usr/bin/env bash
# prepare.sh TARGET: what the end-to-end tests need beside the programs: the openstack client, a Firecracker SDK, an S3 server
# (moto), schemathesis and Tempest, each in a virtual environment, clients of network services, and the lab's kernel where it is needed.
# Writes TARGET/prepare.env with the variables that tell the tests where. Quick when there is nothing to do.
set -euo pipefail
target=$1
cd "$(dirname "$0")/.."
. tests/setup.sh
# Clients and servers that we did not write, for the tests of networks.
need dig bind9-dnsutils dnsmasq dnsmasq-base dhclient isc-dhcp-client dhcpcd dhcpcd-base dhcp6c wide-dhcpv6-client nc netcat-openbsd iperf3 iperf3 strace strace
# from_pypi VENV PACKAGE: installs a package as it is.
from_pypi() {
  need python3 python3
  python3 -m venv "$1" 2>/dev/null || { need /usr/share/doc/python3-venv python3-venv; python3 -m venv --clear "$1"; }
  "$1/bin/pip" install --quiet --disable-pip-version-check "$2"
}
venv=$target/openstack
[ -x "$venv/bin/openstack" ] || from_pypi "$venv" python-openstackclient
sdk=$target/firecracker-sdk
compgen -G "$sdk/lib/python*/site-packages/firecracker" >/dev/null || from_pypi "$sdk" firecracker-python==0.0.5
[ -x "$target/s3/bin/moto_server" ] || from_pypi "$target/s3" 'moto[server,s3]'
[ -x "$target/schemathesis/bin/schemathesis" ] || from_pypi "$target/schemathesis" schemathesis
[ -x "$target/tempest/bin/tempest" ] || from_pypi "$target/tempest" tempest
"$venv/bin/openstack" --version
if reason=$(tests/lab/lab needed); then
  echo "lab: $reason"
  tests/lab/lab prepare
fi
printf 'export MOTE_OPENSTACK=%q MOTE_FIRECRACKER_SDK=%q\n' "$venv/bin/openstack" "$sdk/bin/python" >"$target/prepare.env"
printf 'export MOTE_S3_SERVER=%q MOTE_SCHEMATHESIS=%q\n' "$target/s3/bin/moto_server" "$target/schemathesis/bin/schemathesis" \
  >>"$target/prepare.env"
printf 'export MOTE_TEMPEST=%q\n' "$target/tempest/bin/tempest" >>"$target/prepare.env"
