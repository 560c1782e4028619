#!/usr/bin/env bash
# prepare.sh TARGET: what the end-to-end tests need beside the programs: the openstack client in a virtual environment,
# clients of network services, the lab's kernel where it is needed. Writes TARGET/prepare.env with the variables that tell the tests where. Quick when there is
# nothing to do.
set -euo pipefail
target=$1
cd "$(dirname "$0")/.."
. tests/setup.sh
# Clients and servers that we did not write, for the tests of networks.
need dig bind9-dnsutils dnsmasq dnsmasq-base
venv=$target/openstack
if [ ! -x "$venv/bin/openstack" ]; then
  need python3 python3
  python3 -m venv "$venv" 2>/dev/null || { need /usr/share/doc/python3-venv python3-venv; python3 -m venv --clear "$venv"; }
  "$venv/bin/pip" install --quiet --disable-pip-version-check python-openstackclient
fi
"$venv/bin/openstack" --version
if reason=$(tests/lab/lab needed); then
  echo "lab: $reason"
  tests/lab/lab prepare
fi
printf 'export MOTE_OPENSTACK=%q\n' "$venv/bin/openstack" >"$target/prepare.env"
