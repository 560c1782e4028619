"""The unmodified Firecracker SDK (firecracker-python from PyPI) drives mote-vmm.

firecracker_sdk.py MOTE_VMM GUEST DIRECTORY, in a network namespace with a tap named tap0. Ends with 0 and the number of
requests, or with a traceback. The directory's path must be in lower case: the SDK has the socket's path as a URL's host.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import time

from firecracker import Api
from firecracker.exceptions import APIError

VMM, GUEST, DIRECTORY = sys.argv[1:]
TIME_LIMIT = 60
requests = 0


def path(name):
    return os.path.join(DIRECTORY, name)


class Vm:
    """A process with its API, started as the SDK starts Firecracker."""

    def __init__(self, name):
        self.socket = path(f"{name}.socket")
        self.log = path(f"{name}.log")
        self.console = path(f"{name}.console")
        open(self.log, "w").close()
        arguments = ["--api-sock", self.socket, "--id", name, "--log-path", self.log]
        with open(self.console, "w") as console:
            null = subprocess.DEVNULL
            self.process = subprocess.Popen([VMM, *arguments], stdin=null, stdout=console, stderr=null)
        atexit.register(self.process.kill)
        end = time.monotonic() + TIME_LIMIT
        while not os.path.exists(self.socket):
            assert self.process.poll() is None and time.monotonic() < end, open(self.log).read()
            time.sleep(0.01)
        self.api = Api(self.socket)
        global requests
        count = self.api.session.request

        def counted(*arguments, **named):
            global requests
            requests += 1
            return count(*arguments, **named)

        self.api.session.request = counted

    def state(self):
        return self.api.describe.get().json()["state"]

    def configure(self, boot_args):
        self.api.logger.put(log_path=self.log, level="Debug", show_level=True)
        self.api.boot.put(kernel_image_path=GUEST, boot_args=boot_args)
        self.api.machine_config.put(vcpu_count=1, mem_size_mib=32)

    def end(self):
        self.process.wait(TIME_LIMIT)
        self.api.close()
        return self.process.returncode

    def stop(self):
        """As the SDK stops a microVM."""
        os.kill(self.process.pid, signal.SIGTERM)
        return self.end()


def fault(call):
    try:
        call()
    except APIError as error:
        return str(error)
    raise AssertionError("no fault")


def life():
    """Described, started, paused, resumed, saved, stopped."""
    vm = Vm("life")
    description = vm.api.describe.get().json()
    assert (description["id"], description["state"]) == ("life", "Not started"), description
    assert vm.api.version.get().json()["firecracker_version"].startswith("1."), "a version of Firecracker's API"
    text = fault(lambda: vm.api.vm.patch(state="Paused"))
    assert "not supported before starting" in text, text
    vm.configure("mote.spin")
    disk = path("disk")
    with open(disk, "wb") as file:
        file.truncate(1 << 20)
    vm.api.drive.put(drive_id="rootfs", path_on_host=disk, is_root_device=True, is_read_only=False)
    text = fault(lambda: vm.api.drive.put(drive_id="no", path_on_host="/no/such/file", is_root_device=False))
    assert "/no/such/file" in text, text
    config = vm.api.vm_config.get().json()
    assert config["drives"][0]["drive_id"] == "rootfs" and config["machine-config"]["mem_size_mib"] == 32, config
    vm.api.actions.put(action_type="InstanceStart")
    assert vm.state() == "Running"
    vm.api.vm.patch(state="Paused")
    assert vm.state() == "Paused"
    vm.api.create_snapshot.put(mem_file_path=path("memory"), snapshot_path=path("state"))
    vm.api.vm.patch(state="Resumed")
    assert vm.state() == "Running"
    text = fault(lambda: vm.api.boot.put(kernel_image_path=GUEST))
    assert "not supported after starting" in text, text
    code = vm.stop()
    assert code == 5, (code, open(vm.log).read())

    again = Vm("again")
    backend = {"backend_type": "File", "backend_path": path("memory")}
    again.api.load_snapshot.put(mem_backend=backend, snapshot_path=path("state"), resume_vm=True)
    assert again.state() == "Running"
    assert again.stop() == 5


def metadata():
    """With a network interface and metadata, until the guest has read it and switched itself off."""
    vm = Vm("metadata")
    vm.configure("mote.mmds=169.254.100.2/16")
    vm.api.network.put(iface_id="eth0", host_dev_name="tap0", guest_mac="06:00:ac:10:00:02")
    vm.api.mmds_config.put(version="V2", ipv4_address="169.254.169.254", network_interfaces=["eth0"])
    vm.api.mmds.put(latest={"meta-data": {"ami-id": "ami-87654321"}})
    vm.api.mmds.patch(latest={"meta-data": {"long": "l" * 40_000}})
    assert vm.api.mmds.get().json()["latest"]["meta-data"]["ami-id"] == "ami-87654321"
    vm.api.vsock.put(guest_cid=3, uds_path=path("v.sock"))
    vm.api.actions.put(action_type="InstanceStart")
    code = vm.end()
    console = open(vm.console).read()
    assert code == 0 and " 0 failed" in console and "ok mmds-with-a-token" in console, (code, console)


life()
metadata()
print(json.dumps({"requests": requests}))
