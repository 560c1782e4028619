#!/usr/bin/env python3
"""openstacksdk, and the requests of gophercloud and Terraform, against a cloud with simulated hosts.

Run by the Python of the `openstack` client's virtual environment, with the variables of an openrc file in the environment:

    openstack/bin/python tests/clients/sdk.py KERNEL [PART ...]

KERNEL is a file that is a bootable kernel (the conformance guest). What the command line can show is in
openstack_commands.py; here is what a program does that uses the library: discovery and microversions, pages, filters,
checksums, races. The requests of gophercloud and of Terraform's provider are sent as they send them, with their headers.

Prints one line per check, and at the end how many there were; the exit code is 1 if one failed.
"""

import base64
import hashlib
import os
import sys
import tempfile
import time
import traceback

import keystoneauth1.exceptions
import openstack
from openstack import exceptions

DEADLINE_S = 60
PAUSE_S = 0.1
DISK = b"\x07" * (1 << 20)
CERTIFICATE = """-----BEGIN CERTIFICATE-----
MIIBczCCARmgAwIBAgIUA8HAC8doqb0HOr+H7H7d34wZQp4wCgYIKoZIzj0EAwIw
DjEMMAoGA1UEAwwDYWRhMCAXDTI2MTEyNjA3NDYyNVoYDzIxMjYxMTAyMDc0NjI1
WjAOMQwwCgYDVQQDDANhZGEwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAATMwa6p
9SrCm6UgqFvJwgWrS9wem35zQLnKo9kIrSeZ/V5KDu7qtXEtVz9HUIc8pQA2qu/4
tviakyp4M38PrGp4o1MwUTAdBgNVHQ4EFgQUUo8SgPtgu2j74ZnCZjz/2oh2rlEw
HwYDVR0jBBgwFoAUUo8SgPtgu2j74ZnCZjz/2oh2rlEwDwYDVR0TAQH/BAUwAwEB
/zAKBggqhkjOPQQDAgNIADBFAiEAm858MlKQwrnz0GvVLoto0kDlv4TSqUjbM06T
hsZ5+T0CIFIAJVxaFk5iXzakUhBIi3Fv91zu4SSiFvIiXx6Nc18I
-----END CERTIFICATE-----
"""
CERTIFICATE_SHA1 = "07:5d:5a:01:ae:9f:67:95:f2:42:c3:ac:83:dc:2b:c1:47:d7:69:81"
PUBLIC_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl test"
NOBODY = "11111111-2222-3333-4444-555555555555"
GOPHERCLOUD = {"User-Agent": "HashiCorp Terraform/1.9.8 Terraform Plugin SDK gophercloud/v2.4.0", "Accept": "application/json"}

sleep = time.sleep
# The library asks every two seconds and more; nothing else of it is changed.
time.sleep = lambda seconds: sleep(min(seconds, PAUSE_S))


class Checks:
    """Counts what was checked, and keeps what was not as it should be."""

    def __init__(self):
        self.count = 0
        self.failures = []

    def same(self, what, found, wanted):
        self.count += 1
        good = found == wanted
        print(f"{'ok  ' if good else 'FAIL'} {what}", flush=True)
        if not good:
            self.failures.append(f"{what}: {found!r} is not {wanted!r}")

    def true(self, what, found, shown=None):
        self.same(what, (bool(found), None if found else shown), (True, None))

    def raises(self, what, status, words, call):
        """A call that must be refused with this status, and with these words in what it says."""
        try:
            found = call()
        except (exceptions.HttpException, keystoneauth1.exceptions.HttpError) as error:
            said = f"{error} {error.details}"
            code = error.status_code if isinstance(error, exceptions.HttpException) else error.http_status
            self.same(what, (code, words in said or said), (status, True))
        else:
            self.same(what, found, f"status {status}")

    def part(self, name, steps, *arguments):
        print(f"== {name}", flush=True)
        try:
            steps(self, *arguments)
        except Exception as error:  # the next part is told apart from this one
            traceback.print_exc()
            self.failures.append(f"{name}: {error!r}")


class Terraform:
    """Requests as gophercloud sends them: whole URLs of the catalog, its headers, and no library that mends answers."""

    def __init__(self, conn):
        self.session = conn.session
        self.urls = {
            kind: conn.session.get_endpoint(service_type=kind, interface="public").rstrip("/")
            for kind in ("compute", "image", "network", "identity")
        }
        # As gophercloud does it, whatever the catalog says.
        for kind, version in (("network", "/v2.0"), ("image", "/v2"), ("identity", "/v3")):
            self.urls[kind] = self.urls[kind].removesuffix(version) + version

    def ask(self, method, kind, path, body=None, version=None, headers=None, **more):
        headers = {**GOPHERCLOUD, **(headers or {})}
        if version:
            headers |= {"X-OpenStack-Nova-API-Version": version, "OpenStack-API-Version": f"compute {version}"}
        url = path if path.startswith("http") else self.urls[kind] + path
        return self.session.request(url, method, json=body, headers=headers, raise_exc=False, redirect=False, **more)

    def get(self, kind, path, **more):
        answer = self.ask("GET", kind, path, **more)
        if answer.status_code != 200:
            raise RuntimeError(f"GET {path}: {answer.status_code} {answer.text}")
        return answer.json()

    def names(self, kind, path, collection, **more):
        return sorted(found["name"] for found in self.get(kind, path, **more)[collection])

    def gone(self, kind, path, **more):
        """What is read after a delete, until it is not there: the last answer."""
        deadline = time.monotonic() + DEADLINE_S
        while (answer := self.ask("GET", kind, path, **more)).status_code == 200:
            if time.monotonic() > deadline:
                break
            time.sleep(PAUSE_S)
        return answer


def connect(**more):
    return openstack.connect(load_yaml_config=False, app_name="mote-tests", **more)


def until(call, wanted):
    deadline = time.monotonic() + DEADLINE_S
    while not wanted(found := call()):
        if time.monotonic() > deadline:
            raise RuntimeError(f"never as wanted: {found}")
        time.sleep(PAUSE_S)
    return found


def discovery(check, conn, terraform):
    for kind, status in [("identity", 300), ("image", 300), ("compute", 200), ("network", 200)]:
        root = terraform.urls[kind].rsplit("/v", 1)[0] + "/"
        answer = terraform.ask("GET", kind, root, authenticated=False)
        found = answer.json()
        versions = found["versions"]["values"] if kind == "identity" else found["versions"]
        check.same(f"{kind}: the root document lists its versions", (answer.status_code, len(versions) > 0), (status, True))
        links = [link["href"] for version in versions for link in version["links"] if link["rel"] == "self"]
        check.true(f"{kind}: its links are of this cloud", all(link.startswith(root) for link in links), links)
    data = conn.compute.get_endpoint_data()
    check.same("compute: microversions are discovered", (data.min_microversion, data.max_microversion), ((2, 1), (2, 90)))
    check.same("identity: version 3 is discovered", conn.identity.get_api_major_version()[0], 3)
    check.same("image: version 2 is discovered", conn.image.get_api_major_version()[0], 2)
    check.same("network: version 2 is discovered", conn.network.get_api_major_version()[0], 2)
    check.true("network: extensions are found by alias", conn.network.find_extension("security-group"))
    old, new = connect(compute_default_microversion="2.1"), connect(compute_default_microversion="2.90")
    check.same(
        "compute: a default microversion is what is asked for",
        [each.compute.get("/flavors").headers["OpenStack-API-Version"] for each in (old, new)],
        ["compute 2.1", "compute 2.90"],
    )
    try:
        connect(compute_default_microversion="2.999").compute.get("/flavors")
        said = "nothing"
    except exceptions.ConfigException as error:
        said = str(error)
    check.true("compute: the library sees that a default microversion is not there", "a maximum of 2.90" in said, said)
    for version, sent in [("2.79", "2.79"), ("latest", "2.90")]:
        answer = terraform.ask("GET", "compute", "/flavors", version=version)
        check.same(
            f"gophercloud: {version} is answered in both headers",
            [answer.headers[name] for name in ("OpenStack-API-Version", "X-OpenStack-Nova-API-Version")],
            [f"compute {sent}", sent],
        )
    answer = terraform.ask(
        "GET", "compute", "/flavors", headers={"X-OpenStack-Nova-API-Version": "2.60", "OpenStack-API-Version": "compute 2.79"}
    )
    check.same("gophercloud: the newer header wins", answer.headers["X-OpenStack-Nova-API-Version"], "2.79")
    answer = terraform.ask("GET", "compute", "/flavors", version="2.999")
    check.same("gophercloud: 406 is JSON", (answer.status_code, answer.json()["computeFault"]["code"]), (406, 406))


def identity(check, conn, terraform):
    user, project = conn.current_user_id, conn.current_project_id
    check.same("current project", conn.current_project.name, "admin")
    made = conn.identity.create_application_credential(
        user, name="robot", description="for a program", roles=[{"name": "member"}]
    )
    check.true("an application credential's secret is shown once", made.secret)
    shown = conn.identity.get_application_credential(user, made.id)
    check.same("and not again", (shown.name, shown.secret), ("robot", None))
    robot = credential(made.id, made.secret)
    check.same(
        "application credential: same user and project", (robot.current_user_id, robot.current_project_id), (user, project)
    )
    check.same(
        "application credential: only its roles",
        sorted(role["name"] for role in robot.session.auth.get_access(robot.session)._data["token"]["roles"]),
        ["member", "reader"],
    )
    check.raises(
        "application credential: what its roles may not",
        403,
        "",
        lambda: robot.compute.create_flavor(name="x", ram=64, vcpus=1, disk=0),
    )
    check.raises(
        "application credential: restricted, it makes no other",
        403,
        "",
        lambda: robot.identity.create_application_credential(user, name="more"),
    )
    check.raises("application credential: a wrong secret", 401, "", lambda: credential(made.id, "wrong").session.get_token())
    conn.identity.delete_application_credential(user, made.id)
    check.raises("application credential: deleted", 401, "", lambda: credential(made.id, made.secret).session.get_token())
    lab = conn.create_project("sdk-lab", "default", description="a lab")
    ada = conn.create_user("sdk-ada", password="ada-password", domain_id="default", default_project=lab.id)
    check.true("a role is granted by names", conn.grant_role("member", user=ada.id, project=lab.id))
    other = connect(username="sdk-ada", password="ada-password", project_name="sdk-lab")
    check.same("a user's own project", other.current_project_id, lab.id)
    check.same(
        "role assignments are filtered",
        [found.scope["project"]["id"] for found in conn.identity.role_assignments(user_id=ada.id)],
        [lab.id],
    )
    again = other.connect_as_project("sdk-lab")
    check.same("connect_as_project logs in again", again.current_project_id, lab.id)
    answer = terraform.ask("GET", "identity", "/projects?name=sdk-lab&enabled=true&domain_id=default")
    check.same("Terraform: data source of a project", [found["id"] for found in answer.json()["projects"]], [lab.id])
    check.true("a project is tagged", conn.identity.put(f"/projects/{lab.id}/tags/blue").status_code == 201)
    check.same("and found by its tag", [found.id for found in conn.identity.projects(tags="blue")], [lab.id])


def credential(identifier, secret):
    return openstack.connect(
        load_yaml_config=False,
        load_envvars=False,
        auth_type="v3applicationcredential",
        region_name="RegionOne",
        auth={
            "auth_url": os.environ["OS_AUTH_URL"],
            "application_credential_id": identifier,
            "application_credential_secret": secret,
        },
    )


def image(check, conn, terraform):
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "disk.raw")
        with open(path, "wb") as file:
            file.write(DISK)
        kernel = conn.create_image("sdk-kernel", filename=KERNEL, disk_format="aki", container_format="aki", wait=True)
        check.same("create_image: a kernel", kernel.status, "active")
        made = conn.create_image(
            "sdk-disk",
            filename=path,
            disk_format="raw",
            container_format="bare",
            wait=True,
            validate_checksum=True,
            tags=["one"],
            meta={"kernel_id": kernel.id},
            os_command_line="quiet",
            min_ram=32,
        )
        made = conn.image.get_image(made.id)
        check.same(
            "create_image: checksums",
            (made.checksum, made.hash_algo, made.hash_value, made.size),
            (hashlib.md5(DISK).hexdigest(), "sha512", hashlib.sha512(DISK).hexdigest(), len(DISK)),
        )
        check.same(
            "create_image: properties",
            (made.min_ram, made.properties.get("os_command_line", made.os_command_line), made.tags),
            (32, "quiet", ["one"]),
        )
        check.same(
            "create_image: its own hashes are kept",
            made.properties["owner_specified.openstack.sha256"],
            hashlib.sha256(DISK).hexdigest(),
        )
        check.same(
            "create_image: the same file is not sent twice",
            conn.create_image(
                "sdk-disk", filename=path, disk_format="raw", container_format="bare", wait=True, validate_checksum=True
            ).id,
            made.id,
        )
        back = os.path.join(directory, "back")
        conn.image.download_image(made, stream=False, output=back)
        check.same("download_image checks the bytes", open(back, "rb").read() == DISK, True)
    answer = terraform.ask("GET", "image", f"/images/{made.id}/file", headers={"Range": "bytes=10-19", "Accept": "*/*"})
    check.same(
        "a range",
        (answer.status_code, answer.content, answer.headers["Content-Range"]),
        (206, DISK[10:20], f"bytes 10-19/{len(DISK)}"),
    )
    conn.image.update_image(made, min_disk=1, color="blue")
    check.same(
        "update_image is a JSON patch",
        [terraform.get("image", f"/images/{made.id}")[field] for field in ("min_disk", "color")],
        [1, "blue"],
    )
    conn.image.update_image(conn.image.get_image(made.id), min_disk=0)
    patches(check, terraform, made.id)
    resumable(check, conn, terraform)
    image_lists(check, conn, terraform)


PATCH = "application/openstack-images-v2.1-json-patch"


def patches(check, terraform, image_id):
    def patch(operations, kind=PATCH):
        return terraform.ask("PATCH", "image", f"/images/{image_id}", body=operations, headers={"Content-Type": kind})

    answer = patch(
        [
            {"op": "replace", "path": "/name", "value": "sdk-renamed"},
            {"op": "add", "path": "/shade", "value": "dark"},
            {"op": "remove", "path": "/color"},
        ]
    )
    found = answer.json()
    check.same(
        "gophercloud: three operations of one patch",
        (found["name"], found["shade"], "color" in found),
        ("sdk-renamed", "dark", False),
    )
    answer = patch([{"op": "replace", "path": "/name", "value": "never"}, {"op": "remove", "path": "/nothing"}])
    check.same(
        "a patch is whole or not at all",
        (answer.status_code, terraform.get("image", f"/images/{image_id}")["name"]),
        (409, "sdk-renamed"),
    )
    check.same("a patch of what is fixed", patch([{"op": "replace", "path": "/status", "value": "queued"}]).status_code, 403)
    check.same("a patch in another type", patch([], "application/json").status_code, 415)
    answer = patch(
        [{"op": "replace", "path": "/tags", "value": ["one", "two"]}, {"op": "replace", "path": "/name", "value": "sdk-disk"}]
    )
    check.same("tags are replaced", sorted(answer.json()["tags"]), ["one", "two"])


def resumable(check, conn, terraform):
    """An image that is made first and filled later, as Terraform does it; then deletes that are sent twice."""
    answer = terraform.ask(
        "POST",
        "image",
        "/images",
        body={
            "name": "sdk-later",
            "container_format": "bare",
            "disk_format": "raw",
            "min_disk": 0,
            "min_ram": 0,
            "protected": False,
            "visibility": "private",
            "tags": ["two"],
            "os_version": "1",
        },
    )
    made = answer.json()
    check.same("Terraform: image made", (answer.status_code, made["status"], made["os_version"]), (201, "queued", "1"))
    check.same("Terraform: where it is", answer.headers["Location"].endswith(f"/v2/images/{made['id']}"), True)
    check.same("no bytes yet", terraform.ask("GET", "image", f"/images/{made['id']}/file").status_code, 204)
    path = f"/images/{made['id']}/file"
    octets = {"Content-Type": "application/octet-stream"}
    answer = terraform.ask("PUT", "image", path, headers={**octets, "Content-Type": "application/json"}, data=DISK)
    check.same("bytes of another type", answer.status_code, 415)
    answer = terraform.ask("PUT", "image", path, headers=octets, data=DISK)
    check.same("Terraform: bytes uploaded", (answer.status_code, answer.content), (204, b""))
    check.same("bytes are not changed", terraform.ask("PUT", "image", path, headers=octets, data=DISK).status_code, 409)
    check.same("get_image of it", conn.image.get_image(made["id"]).status, "active")
    conn.image.delete_image(made["id"])
    conn.image.delete_image(made["id"])
    check.same("delete_image twice", conn.image.find_image("sdk-later"), None)
    answer = terraform.ask("DELETE", "image", f"/images/{made['id']}")
    check.same("a deleted image is not there", answer.status_code, 404)
    check.same("find_image is None", conn.image.find_image(NOBODY), None)


def image_lists(check, conn, terraform):
    for number in range(4):
        conn.image.create_image(name=f"sdk-page-{number}", disk_format="raw", container_format="bare")
    names = [found.name for found in conn.image.images(limit=1, sort="name:asc", status="queued")]
    check.same("images: pages of one", names, [f"sdk-page-{number}" for number in range(4)])
    newest = terraform.get("image", "/images?name=&sort=created_at:desc&limit=1")["images"]
    check.same("an empty name is a name", newest, [])
    newest = terraform.get("image", "/images?sort=created_at%3Adesc&limit=1&visibility=shared&status=queued")
    check.same(
        "Terraform: the newest image", ([found["name"] for found in newest["images"]], "next" in newest), (["sdk-page-3"], True)
    )
    found = terraform.names("image", "/images?limit=1000&name=in%3Asdk-page-0%2Csdk-disk&sort=name%3Aasc", "images")
    check.same("images: in:", found, ["sdk-disk", "sdk-page-0"])
    found = terraform.names("image", "/images?tag=one&tag=two&sort_key=name&sort_dir=asc", "images")
    check.same("images: every tag", found, ["sdk-disk"])
    found = terraform.names("image", f"/images?size_min={len(DISK)}&size_max={len(DISK)}&disk_format=raw", "images")
    check.same("images: sizes", found, ["sdk-disk"])
    found = terraform.names("image", "/images?os_command_line=quiet&visibility=shared", "images")
    check.same("Terraform: properties of an image", found, ["sdk-disk"])
    answer = terraform.ask("GET", "image", "/images?visibility=secret")
    check.same("images: a visibility that is none", answer.status_code, 400)
    for number in range(4):
        conn.delete_image(f"sdk-page-{number}")


def network(check, conn, terraform):
    made = terraform.ask("POST", "network", "/networks", body={"network": {"admin_state_up": True, "name": "sdk-net"}})
    check.same("Terraform: network made", made.status_code, 201)
    net = made.json()["network"]
    subnet = terraform.ask(
        "POST",
        "network",
        "/subnets",
        body={
            "subnet": {
                "network_id": net["id"],
                "cidr": "10.61.0.0/24",
                "ip_version": 4,
                "name": "sdk-sub",
                "enable_dhcp": True,
                "gateway_ip": "10.61.0.1",
                "allocation_pools": [{"start": "10.61.0.10", "end": "10.61.0.250"}],
                "dns_nameservers": ["192.0.2.53"],
                "host_routes": [],
            }
        },
    ).json()["subnet"]
    check.same("Terraform: subnet made", subnet["allocation_pools"], [{"start": "10.61.0.10", "end": "10.61.0.250"}])
    ports = list(conn.network.create_ports([{"network_id": net["id"], "name": f"sdk-port-{number}"} for number in range(5)]))
    check.same("create_ports makes them all", [port.name for port in ports], [f"sdk-port-{number}" for number in range(5)])
    check.same("with addresses of their own", len({port.fixed_ips[0]["ip_address"] for port in ports}), 5)
    taken = ports[0].fixed_ips[0]["ip_address"]
    answer = terraform.ask(
        "POST",
        "network",
        "/ports",
        body={
            "ports": [
                {"network_id": net["id"], "name": "sdk-half"},
                {"network_id": net["id"], "fixed_ips": [{"subnet_id": subnet["id"], "ip_address": taken}]},
            ]
        },
    )
    check.same(
        "create_ports makes all or none",
        (answer.status_code, answer.json()["NeutronError"]["type"], list(conn.network.ports(name="sdk-half"))),
        (409, "IpAddressAlreadyAllocated", []),
    )
    names = [
        port.name
        for port in conn.network.ports(limit=2, network_id=net["id"], device_owner="", sort_key="name", sort_dir="asc")
    ]
    check.same("ports: pages of two", names, [port.name for port in ports])
    page = terraform.get(
        "network", f"/ports?limit=2&sort_key=name&sort_dir=asc&network_id={net['id']}&device_owner=&page_reverse=false"
    )
    check.same("gophercloud: a page has its links", [link["rel"] for link in page["ports_links"]], ["next"])
    following = page["ports_links"][0]["href"]
    page = terraform.get("network", following)
    check.same(
        "gophercloud: the next page, and the way back",
        ([port["name"] for port in page["ports"]], sorted(link["rel"] for link in page["ports_links"])),
        (["sdk-port-2", "sdk-port-3"], ["next", "previous"]),
    )
    filters(check, terraform, net, subnet, ports)
    revisions(check, conn, terraform, ports[1])
    security_groups(check, conn, terraform)
    floating_ips(check, conn, terraform, ports[0], subnet)
    details = conn.network.get_quota(conn.current_project_id, details=True)
    check.same(
        "quota details count",
        (details.ports["used"] >= 5, details.ports["limit"]),
        (True, conn.network.get_quota(conn.current_project_id).ports),
    )
    for port in ports:
        conn.network.delete_port(port.id)
    answer = terraform.gone("network", f"/ports/{ports[0].id}")
    check.same("Terraform: a deleted port", (answer.status_code, answer.json()["NeutronError"]["type"]), (404, "PortNotFound"))
    check.same("delete_port of none", conn.network.delete_port(ports[0].id, ignore_missing=True), None)


def filters(check, terraform, net, subnet, ports):
    for path, collection, wanted in [
        (f"/networks?name=sdk-net&admin_state_up=true&status=ACTIVE&tenant_id={net['tenant_id']}", "networks", ["sdk-net"]),
        (f"/networks?id={net['id']}&shared=false", "networks", ["sdk-net"]),
        ("/networks?router%3Aexternal=true&name=sdk-net", "networks", []),
        (f"/subnets?network_id={net['id']}&ip_version=4&enable_dhcp=true", "subnets", ["sdk-sub"]),
        ("/subnets?cidr=10.61.0.0%2F24&gateway_ip=10.61.0.1", "subnets", ["sdk-sub"]),
        (f"/ports?fixed_ips=ip_address%3D{ports[3].fixed_ips[0]['ip_address']}", "ports", ["sdk-port-3"]),
        (f"/ports?fixed_ips=subnet_id%3D{subnet['id']}&name=sdk-port-2&name=sdk-port-4", "ports", ["sdk-port-2", "sdk-port-4"]),
        (f"/ports?mac_address={ports[2].mac_address}", "ports", ["sdk-port-2"]),
        (f"/ports?device_id={NOBODY}", "ports", []),
        ("/security-groups?name=default&fields=name", "security_groups", ["default"]),
    ]:
        check.same(f"Terraform: GET {path.split('tenant')[0]}", terraform.names("network", path, collection), wanted)
    answer = terraform.ask("PUT", "network", f"/ports/{ports[4].id}/tags", body={"tags": ["blue", "red"]})
    check.same("Terraform: tags of a port", sorted(answer.json()["tags"]), ["blue", "red"])
    for query, wanted in [("tags=blue%2Cred", 1), ("tags-any=blue%2Cgreen", 1), ("tags=blue%2Cgreen", 0), ("not-tags=blue", 4)]:
        found = terraform.names("network", f"/ports?{query}&network_id={net['id']}&device_owner=", "ports")
        check.same(f"Terraform: ports by {query}", len(found), wanted)
    found = terraform.get("network", f"/ports?fields=id&fields=name&id={ports[0].id}")["ports"]
    check.same("fields choose", found, [{"id": ports[0].id, "name": "sdk-port-0"}])


def revisions(check, conn, terraform, port):
    """gophercloud's RevisionNumber and the library's if_revision: an update of what was seen, not of what came after."""
    seen = conn.network.get_port(port.id).revision_number
    changed = conn.network.update_port(port.id, if_revision=seen, description="first")
    check.same("if_revision of what is there", (changed.description, changed.revision_number > seen), ("first", True))
    check.raises(
        "if_revision of what was there before",
        412,
        "revision",
        lambda: conn.network.update_port(port.id, if_revision=seen, description="second"),
    )
    answer = terraform.ask("DELETE", "network", f"/ports/{port.id}", headers={"If-Match": f"revision_number={seen}"})
    check.same("gophercloud: a delete of what was there before", answer.status_code, 412)
    check.same("neither was done", conn.network.get_port(port.id).description, "first")


def security_groups(check, conn, terraform):
    group = terraform.ask(
        "POST", "network", "/security-groups", body={"security_group": {"name": "sdk-group", "description": ""}}
    ).json()["security_group"]
    check.same(
        "a group is made with rules for what goes out",
        sorted(rule["ethertype"] for rule in group["security_group_rules"]),
        ["IPv4", "IPv6"],
    )
    for rule in group["security_group_rules"]:
        terraform.ask("DELETE", "network", f"/security-group-rules/{rule['id']}")
    check.same(
        "Terraform: delete_default_rules",
        terraform.get("network", f"/security-group-rules?security_group_id={group['id']}")["security_group_rules"],
        [],
    )
    wanted = {
        "direction": "ingress",
        "ethertype": "IPv4",
        "port_range_min": 22,
        "port_range_max": 22,
        "protocol": "tcp",
        "remote_ip_prefix": "0.0.0.0/0",
        "security_group_id": group["id"],
        "description": "",
    }
    made = terraform.ask("POST", "network", "/security-group-rules", body={"security_group_rule": wanted})
    check.same(
        "Terraform: a rule", (made.status_code, {key: made.json()["security_group_rule"][key] for key in wanted}), (201, wanted)
    )
    again = terraform.ask("POST", "network", "/security-group-rules", body={"security_group_rule": wanted})
    check.same(
        "Terraform: the same rule", (again.status_code, again.json()["NeutronError"]["type"]), (409, "SecurityGroupRuleExists")
    )
    conn.create_security_group_rule("sdk-group", port_range_min=80, port_range_max=80, protocol="tcp", direction="ingress")
    check.same("create_security_group_rule by name", len(conn.get_security_group("sdk-group").security_group_rules), 2)
    check.true("delete_security_group", conn.delete_security_group("sdk-group"))
    answer = terraform.gone("network", f"/security-groups/{group['id']}")
    check.same(
        "Terraform: a deleted group",
        (answer.status_code, answer.json()["NeutronError"]["type"]),
        (404, "SecurityGroupNotFound"),
    )


def floating_ips(check, conn, terraform, port, subnet):
    outside = conn.network.create_network(name="sdk-outside", is_router_external=True)
    conn.network.create_subnet(network_id=outside.id, cidr="203.0.113.0/24", ip_version=4, name="sdk-outside")
    check.same(
        "Terraform: external networks",
        terraform.names("network", "/networks?router%3Aexternal=true&name=sdk-outside", "networks"),
        ["sdk-outside"],
    )
    router = conn.create_router("sdk-router", ext_gateway_net_id=outside.id)
    conn.add_router_interface(router, subnet_id=subnet["id"])
    check.same(
        "Terraform: ports of a router",
        [
            found["device_id"]
            for found in terraform.get("network", f"/ports?device_id={router.id}&device_owner=network%3Arouter_interface")[
                "ports"
            ]
        ],
        [router.id],
    )
    made = terraform.ask(
        "POST", "network", "/floatingips", body={"floatingip": {"floating_network_id": outside.id, "port_id": port.id}}
    ).json()["floatingip"]
    found = terraform.get("network", f"/floatingips?port_id={port.id}")["floatingips"]
    check.same("Terraform: floating IP of a port", [one["id"] for one in found], [made["id"]])
    found = terraform.get("network", f"/floatingips?floating_ip_address={made['floating_ip_address']}&status=")["floatingips"]
    check.same("a status that is none", found, [])
    check.same("the library knows it by its address", conn.get_floating_ip(made["floating_ip_address"]).port_id, port.id)
    answer = terraform.ask("PUT", "network", f"/floatingips/{made['id']}", body={"floatingip": {"port_id": None}})
    check.same("Terraform: disassociated", (answer.status_code, answer.json()["floatingip"]["fixed_ip_address"]), (200, None))
    check.true("delete_floating_ip", conn.delete_floating_ip(made["id"]))
    answer = terraform.gone("network", f"/floatingips/{made['id']}")
    check.same(
        "Terraform: a deleted floating IP",
        (answer.status_code, answer.json()["NeutronError"]["type"]),
        (404, "FloatingIPNotFound"),
    )
    conn.remove_router_interface(router, subnet_id=subnet["id"])
    check.true("delete_router", conn.delete_router("sdk-router"))
    check.true("delete_network", conn.delete_network("sdk-outside"))


def compute(check, conn, terraform):
    flavors(check, conn, terraform)
    keypairs(check, conn, terraform)
    server = servers(check, conn, terraform)
    server_parts(check, conn, terraform, server)
    server_lists(check, conn, terraform, server)
    from_image(check, conn, terraform)
    ends(check, conn, terraform, server)


def flavors(check, conn, terraform):
    for number in range(4):
        conn.compute.create_flavor(name=f"sdk-{number}", ram=4096 + number, vcpus=1, disk=0)
    found = [flavor.name for flavor in conn.compute.flavors(limit=1, min_ram=4096, sort_key="memory_mb")]
    check.same("flavors: pages of one", [name for name in found if name.startswith("sdk-")], [f"sdk-{n}" for n in range(4)])
    found = terraform.names("compute", "/flavors/detail?minRam=4098&is_public=None", "flavors")
    check.same("Terraform: flavors by minRam", [name for name in found if name.startswith("sdk-")], ["sdk-2", "sdk-3"])
    page = terraform.get("compute", "/flavors/detail?limit=1")
    check.same("gophercloud: flavors_links", [link["rel"] for link in page["flavors_links"]], ["next"])
    flavor = conn.compute.find_flavor("sdk-0", get_extra_specs=True)
    conn.compute.create_flavor_extra_specs(flavor, {"quota:disk_total_iops_sec": "7"})
    answer = terraform.get("compute", f"/flavors/{flavor.id}/os-extra_specs")
    check.same("Terraform: extra specs", answer, {"extra_specs": {"quota:disk_total_iops_sec": "7"}})
    shown = terraform.get("compute", f"/flavors/{flavor.id}", version="2.61")["flavor"]
    check.same("extra specs are in a flavor since 2.61", shown["extra_specs"], {"quota:disk_total_iops_sec": "7"})
    for number in range(4):
        conn.delete_flavor(f"sdk-{number}")
    answer = terraform.ask("GET", "compute", f"/flavors/{flavor.id}")
    check.same("a deleted flavor", (answer.status_code, answer.json()["itemNotFound"]["code"]), (404, 404))


def keypairs(check, conn, terraform):
    answer = terraform.ask("POST", "compute", "/os-keypairs", body={"keypair": {"name": "sdk-key", "public_key": PUBLIC_KEY}})
    check.same("Terraform: a keypair", (answer.status_code, answer.json()["keypair"]["public_key"]), (200, PUBLIC_KEY))
    answer = terraform.ask(
        "POST",
        "compute",
        "/os-keypairs",
        version="2.2",
        body={"keypair": {"name": "sdk-typed", "public_key": PUBLIC_KEY, "type": "ssh"}},
    )
    check.same("a keypair's type since 2.2", (answer.status_code, answer.json()["keypair"]["type"]), (201, "ssh"))
    # openstacksdk's own name of the type; the openstack client sends another, which is nobody's.
    taken = conn.compute.create_keypair(name="sdk-x509", type="x509", public_key=CERTIFICATE)
    check.same("a certificate as a keypair", (taken.type, taken.fingerprint), ("x509", CERTIFICATE_SHA1))
    made = conn.compute.create_keypair(name="sdk-made", type="x509")
    check.same("a certificate that is made", (made.type, made.public_key[:27]), ("x509", "-----BEGIN CERTIFICATE-----"))
    for name in ["sdk-x509", "sdk-made"]:
        conn.compute.delete_keypair(name)
    answer = terraform.ask(
        "POST", "compute", "/os-keypairs", body={"keypair": {"name": "sdk-x", "public_key": PUBLIC_KEY, "type": "ssh"}}
    )
    check.same("and not before", answer.status_code, 400)
    answer = terraform.ask("POST", "compute", "/os-keypairs", body={"keypair": {"name": "sdk-key", "public_key": PUBLIC_KEY}})
    check.same(
        "a keypair that is there",
        (answer.status_code, "sdk-key" in answer.json()["conflictingRequest"]["message"]),
        (409, True),
    )
    page = terraform.get("compute", "/os-keypairs?limit=1", version="2.35")
    following = terraform.get("compute", page["keypairs_links"][0]["href"], version="2.35")
    check.same(
        "keypairs: pages of one since 2.35",
        [one["keypair"]["name"] for one in page["keypairs"] + following["keypairs"]],
        ["sdk-key", "sdk-typed"],
    )
    conn.delete_keypair("sdk-typed")
    answer = terraform.ask("GET", "compute", "/os-keypairs/sdk-typed")
    check.same("a deleted keypair", (answer.status_code, "itemNotFound" in answer.json()), (404, True))


def servers(check, conn, terraform):
    net, disk = conn.network.find_network("sdk-net"), conn.image.find_image("sdk-disk")
    flavor = conn.compute.find_flavor("m1.nano")
    made = conn.compute.create_server(
        name="sdk-x",
        image_id=disk.id,
        flavor_id=flavor.id,
        networks=[{"uuid": net.id}],
        key_name="sdk-key",
        metadata={"role": "web"},
        user_data=base64.b64encode(b"#!/bin/sh\n").decode(),
    )
    check.true("create_server makes no password up", not made.admin_password, made.to_dict())
    made = conn.compute.wait_for_server(made, interval=PAUSE_S)
    check.same("wait_for_server", (made.status, made.vm_state, made.power_state), ("ACTIVE", "active", 1))
    check.same("a server's addresses by network", list(made.addresses), ["sdk-net"])
    cloud = conn.create_server(
        "sdk-y",
        image="sdk-disk",
        flavor="m1.nano",
        network="sdk-net",
        wait=True,
        auto_ip=False,
        meta={"role": "db"},
        userdata="#!/bin/sh\n",
        key_name="sdk-key",
        security_groups=["default"],
    )
    check.same("create_server of the cloud layer", (cloud.status, cloud.private_v4.startswith("10.61.0.")), ("ACTIVE", True))
    check.same("its security groups", [group["name"] for group in conn.list_server_security_groups(cloud)], ["default"])
    answer = terraform.ask(
        "POST",
        "compute",
        "/servers",
        body={
            "server": {
                "name": "sdk-xx",
                "imageRef": disk.id,
                "flavorRef": flavor.id,
                "networks": [{"uuid": net.id}],
                "config_drive": False,
                "security_groups": [{"name": "default"}],
                "user_data": "",
                "metadata": {},
                "key_name": "sdk-key",
            }
        },
    )
    check.same(
        "Terraform: a server",
        (
            answer.status_code,
            sorted(answer.json()["server"])[-1],
            answer.headers["Location"].endswith(f"/servers/{answer.json()['server']['id']}"),
        ),
        (202, "security_groups", True),
    )
    until(
        lambda: terraform.get("compute", f"/servers/{answer.json()['server']['id']}")["server"],
        lambda s: s["status"] == "ACTIVE",
    )
    return made


def server_parts(check, conn, terraform, server):
    path = f"/servers/{server.id}"
    conn.compute.set_server_metadata(server, color="blue", **{"size": "1"})
    check.same(
        "set_server_metadata",
        conn.compute.fetch_server_metadata(server).metadata,
        {"role": "web", "color": "blue", "size": "1"},
    )
    conn.compute.delete_server_metadata(server, ["size"])
    answer = terraform.ask("PUT", "compute", f"{path}/metadata/color", body={"meta": {"color": "red"}})
    check.same("gophercloud: one metadatum", answer.json(), {"meta": {"color": "red"}})
    answer = terraform.ask("GET", "compute", f"{path}/metadata/size")
    check.same("a deleted metadatum", (answer.status_code, "itemNotFound" in answer.json()), (404, True))
    check.same(
        "reset of metadata",
        terraform.ask("PUT", "compute", f"{path}/metadata", body={"metadata": {"role": "web"}}).json(),
        {"metadata": {"role": "web"}},
    )
    conn.compute.add_tag_to_server(server, "blue")
    answer = terraform.ask("PUT", "compute", f"{path}/tags", version="2.52", body={"tags": ["blue", "red"]})
    check.same("Terraform: tags of a server", sorted(answer.json()["tags"]), ["blue", "red"])
    check.same(
        "a tag is there or not",
        [terraform.ask("GET", "compute", f"{path}/tags/{tag}", version="2.52").status_code for tag in ("blue", "green")],
        [204, 404],
    )
    check.same("tags before 2.26", terraform.ask("GET", "compute", f"{path}/tags", version="2.25").status_code, 404)
    conn.compute.remove_tag_from_server(server, "red")
    check.same("tags are in a server since 2.26", terraform.get("compute", path, version="2.79")["server"]["tags"], ["blue"])
    output = conn.compute.get_server_console_output(server, length=50)
    check.true("console output", "simulated guest of server" in output["output"], output)
    check.raises(
        "server external events are not for clients",
        404,
        "",
        lambda: list(conn.compute.create_server_external_events([{"name": "network-changed", "server_uuid": server.id}])),
    )
    ports = [port["id"] for port in terraform.get("network", f"/ports?device_id={server.id}")["ports"]]
    check.same(
        "Terraform: ports of a server",
        [one["port_id"] for one in terraform.get("compute", f"{path}/os-interface")["interfaceAttachments"]],
        ports,
    )
    check.same(
        "Terraform: volumes of a server", terraform.get("compute", f"{path}/os-volume_attachments"), {"volumeAttachments": []}
    )
    old = terraform.get("compute", path)["server"]
    new = terraform.get("compute", path, version="2.79")["server"]
    check.same(
        "a flavor is a link before 2.47, and itself since",
        (sorted(old["flavor"]), new["flavor"]["original_name"]),
        (["id", "links"], "m1.nano"),
    )
    check.same(
        "fields of microversions",
        [name in new and name not in old for name in ("locked", "description", "tags", "host_status")],
        [True] * 4,
    )


def server_lists(check, conn, terraform, server):
    for path, wanted in [
        ("name=%5Esdk-x%24", ["sdk-x"]),
        ("name=sdk-x", ["sdk-x", "sdk-xx"]),
        ("name=%5Esdk-&status=ACTIVE", None),
        ("status=SHUTOFF", []),
        ("image=" + conn.image.find_image("sdk-disk").id, None),
        ("ip=%5E10.61.0.", None),
        (f"uuid={server.id}", ["sdk-x"]),
        (f"flavor={NOBODY}", []),
    ]:
        wanted = ["sdk-x", "sdk-xx", "sdk-y"] if wanted is None else wanted
        check.same(
            f"Terraform: GET /servers/detail?{path[:24]}",
            terraform.names("compute", f"/servers/detail?{path}", "servers"),
            wanted,
        )
    for query, wanted in [("tags=blue", ["sdk-x"]), ("not-tags=blue", ["sdk-xx", "sdk-y"])]:
        check.same(
            f"gophercloud: servers by {query}",
            terraform.names("compute", f"/servers/detail?{query}", "servers", version="2.26"),
            wanted,
        )
    found = [one.name for one in conn.compute.servers(limit=1, sort_key="display_name", sort_dir="desc")]
    check.same("servers: pages of one", found, ["sdk-y", "sdk-xx", "sdk-x"])
    page = terraform.get("compute", "/servers/detail?limit=2&sort_key=display_name&sort_dir=asc")
    check.same(
        "gophercloud: servers_links",
        (
            [link["rel"] for link in page["servers_links"]],
            terraform.names("compute", page["servers_links"][0]["href"], "servers"),
        ),
        (["next"], ["sdk-y"]),
    )
    answer = terraform.ask("GET", "compute", f"/servers?marker={NOBODY}")
    check.same("a marker that is none", (answer.status_code, "badRequest" in answer.json()), (400, True))
    check.same("search_servers", [one.name for one in conn.search_servers(filters={"metadata": {"role": "db"}})], ["sdk-y"])


def from_image(check, conn, terraform):
    """Terraform's block_device: the local disk, made of the image, that goes with its server."""
    disk, flavor = conn.image.find_image("sdk-disk"), conn.compute.find_flavor("m1.nano")
    port = conn.network.create_port(network_id=conn.network.find_network("sdk-net").id, name="sdk-own")
    body = {
        "name": "sdk-z",
        "imageRef": disk.id,
        "flavorRef": flavor.id,
        "networks": [{"port": port.id}],
        "block_device_mapping_v2": [
            {
                "boot_index": 0,
                "delete_on_termination": True,
                "destination_type": "local",
                "source_type": "image",
                "uuid": disk.id,
            }
        ],
    }
    answer = terraform.ask("POST", "compute", "/servers", body={"server": body})
    check.same("Terraform: block_device of an image", answer.status_code, 202)
    made = answer.json()["server"]["id"]
    found = until(lambda: terraform.get("compute", f"/servers/{made}")["server"], lambda found: found["status"] != "BUILD")
    check.same(
        "it boots from the image, on the port",
        (found["status"], found["image"]["id"], found["addresses"]["sdk-net"][0]["addr"]),
        ("ACTIVE", disk.id, port.fixed_ips[0]["ip_address"]),
    )
    volume = {**body["block_device_mapping_v2"][0], "destination_type": "volume", "volume_size": 1}
    answer = terraform.ask(
        "POST",
        "compute",
        "/servers",
        body={"server": {**body, "imageRef": "", "networks": [], "block_device_mapping_v2": [volume]}},
    )
    check.same(
        "volumes are refused by name",
        (answer.status_code, "block_device_mapping_v2" in answer.text or "volume" in answer.text),
        (400, True),
    )
    conn.compute.delete_server(made)
    answer = terraform.gone("compute", f"/servers/{made}")
    check.same("Terraform: a deleted server", (answer.status_code, answer.json()["itemNotFound"]["code"]), (404, 404))
    check.same(
        "a port of the tenant's own outlives it",
        until(lambda: conn.network.get_port(port.id), lambda found: not found.device_id).status,
        "DOWN",
    )
    conn.network.delete_port(port)


def ends(check, conn, terraform, server):
    conn.compute.stop_server(server)
    check.same("stop_server", conn.compute.wait_for_server(server, status="SHUTOFF", interval=PAUSE_S).power_state, 4)
    check.raises("a server that is stopped is not stopped", 409, "vm_state stopped", lambda: conn.compute.stop_server(server))
    attached = conn.compute.create_server_interface(server, net_id=conn.network.find_network("sdk-net").id)
    check.same("an interface is attached", len(list(conn.compute.server_interfaces(server))), 2)
    conn.compute.delete_server_interface(attached.port_id, server=server)
    answer = terraform.gone("compute", f"/servers/{server.id}/os-interface/{attached.port_id}")
    check.same("Terraform: a detached interface", (answer.status_code, "itemNotFound" in answer.json()), (404, True))
    answer = terraform.ask("POST", "compute", f"/servers/{server.id}/action", body={"dance": None})
    check.same("an action that is none", (answer.status_code, "badRequest" in answer.json()), (400, True))
    for name in ("sdk-x", "sdk-xx", "sdk-y"):
        check.true(f"delete_server {name} waits", conn.delete_server(name, wait=True))
    answer = terraform.ask("DELETE", "compute", f"/servers/{server.id}")
    check.same("a delete of what was deleted", (answer.status_code, "itemNotFound" in answer.json()), (404, True))
    check.same("delete_server of none", conn.delete_server("sdk-x", wait=True), False)
    check.same(
        "no port is left",
        list(conn.network.ports(network_id=conn.network.find_network("sdk-net").id, device_owner="compute:nova")),
        [],
    )
    limits = conn.compute.get_limits().absolute
    check.same("nothing is in use", (limits.instances_used, limits.total_cores_used), (0, 0))
    conn.delete_keypair("sdk-key")
    check.true("the network goes", conn.delete_network("sdk-net"))
    check.true("the images go", conn.delete_image("sdk-disk", wait=True) and conn.delete_image("sdk-kernel", wait=True))


PARTS = {"discovery": discovery, "identity": identity, "image": image, "network": network, "compute": compute}

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    KERNEL = sys.argv[1]
    CHECKS = Checks()
    CONNECTION = connect()
    TERRAFORM = Terraform(CONNECTION)
    for wanted in sys.argv[2:] or PARTS:
        CHECKS.part(wanted, PARTS[wanted], CONNECTION, TERRAFORM)
    for failure in CHECKS.failures:
        print(f"FAILED {failure}")
    print(f"{CHECKS.count} checks, {len(CHECKS.failures)} failed")
    sys.exit(1 if CHECKS.failures else 0)
