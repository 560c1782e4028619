#!/usr/bin/env python3
"""The unmodified `openstack` client against a cloud with simulated hosts: each command's result is checked.

Run by the Python of the client's virtual environment, with the variables of an openrc file in the environment:

    openstack/bin/python tests/clients/openstack_commands.py KERNEL [NAME ...]

KERNEL is a file that is a bootable kernel (the conformance guest). With names only those parts run (identity, image,
network, compute). The client's own entry point is called in this process, once per command with fresh arguments and a
fresh login, so that a hundred and more commands do not start a hundred interpreters.

Prints one line per command with its time, and at the end how many there were; the exit code is 1 if one failed. A run of
all parts also fails if a command that the client has for these services was not run with success and is not named in
openstack_absent.txt beside this file, with the reason.
"""

import hashlib
import json
import os
import struct
import sys
import tempfile
import time

import openstack
import openstack_breadth
from openstack_client import Client, column, complete, has, same


def identity(client):
    token = client.json("token", "issue")
    same(len(token["project_id"]), 32, "project id")
    catalog = client.json("catalog", "list")
    has(column(catalog, "Type"), "compute", "identity", "image", "network")
    same(client.json("catalog", "show", "compute")["type"], "compute")
    has(column(client.json("service", "list"), "Type"), "compute", "identity", "image", "network")
    endpoints = client.json("endpoint", "list", "--service", "compute", "--interface", "public")
    same(len(endpoints), 1, "public endpoints of compute")
    has(column(client.json("region", "list"), "Region"), endpoints[0]["Region"])
    has(column(client.json("domain", "list"), "Name"), "Default")
    same(client.json("domain", "show", "default")["name"], "Default")
    has(column(client.json("role", "list"), "Name"), "admin", "manager", "member", "reader")
    same(client.json("role", "show", "member")["name"], "member")

    project = client.json("project", "create", "lab", "--description", "a lab")
    same((project["name"], project["description"], project["enabled"]), ("lab", "a lab", True))
    client.fails("409", "project", "create", "lab")
    has(column(client.json("project", "list"), "Name"), "admin", "lab")
    client.text("project", "set", "lab", "--description", "the lab")
    same(client.json("project", "show", "lab")["description"], "the lab")
    user = client.json("user", "create", "ada", "--password", "ada-password", "--email", "ada@example.org")
    same(user["name"], "ada")
    client.fails("409", "user", "create", "ada", "--password", "x-password")
    has(column(client.json("user", "list"), "Name"), "admin", "ada")
    client.text("user", "set", "ada", "--description", "the first")
    same(client.json("user", "show", "ada")["description"], "the first")

    ada = {"OS_USERNAME": "ada", "OS_PASSWORD": "ada-password", "OS_PROJECT_NAME": "lab"}
    client.fails("401", "token", "issue", env=ada)
    client.text("role", "add", "--user", "ada", "--project", "lab", "reader")
    same(client.json("token", "issue", env=ada)["user_id"], user["id"])
    rows = client.json("role", "assignment", "list", "--user", "ada", "--project", "lab", "--names")
    same(column(rows, "Role"), ["reader"])
    client.fails("403", "user", "list", env=ada)
    client.fails("403", "network", "create", "forbidden", env=ada)
    client.fails("403", "project", "create", "forbidden", env=ada)
    client.text("role", "add", "--user", "ada", "--project", "lab", "member")
    client.text("role", "remove", "--user", "ada", "--project", "lab", "reader")
    rows = client.json("role", "assignment", "list", "--user", "ada", "--names")
    same(column(rows, "Role"), ["member"])
    client.text("user", "set", "ada", "--password", "new-password")
    client.fails("401", "token", "issue", env=ada)
    ada["OS_PASSWORD"] = "new-password"
    client.json("token", "issue", env=ada)
    client.text("user", "set", "ada", "--disable")
    client.fails("401", "token", "issue", env=ada)
    client.text("user", "set", "ada", "--enable")
    issued = client.json("token", "issue", env=ada)
    client.text("token", "revoke", issued["id"], env=ada)
    client.fails("401", "--os-auth-type", "token", "--os-token", issued["id"], "project", "list", env={
        "OS_USERNAME": "", "OS_PASSWORD": "", "OS_USER_DOMAIN_NAME": ""})
    trusts(client, ada)
    credentials(client)
    domains(client)
    endpoint_filter(client, ada)
    limits(client)
    client.text("project", "set", "lab", "--disable")
    client.fails("401", "token", "issue", env=ada)
    client.text("project", "set", "lab", "--enable")
    client.text("user", "delete", "ada")
    client.fails("No User found", "user", "show", "ada")
    client.text("project", "delete", "lab")
    client.fails("No Project found", "project", "show", "lab")


def credentials(client):
    keys = {"access": "first", "secret": "s"}
    made = client.json("credential", "create", "--type", "ec2", "--project", "lab", "ada", json.dumps(keys))
    same(made["id"], hashlib.sha256(b"first").hexdigest())
    client.fails("409", "credential", "create", "--type", "ec2", "--project", "lab", "ada", json.dumps(keys))
    keys["access"] = "second"
    client.text("credential", "set", made["id"], "--user", "ada", "--type", "ec2", "--project", "lab",
        "--data", json.dumps(keys))
    same(json.loads(client.json("credential", "show", made["id"])["blob"])["access"], "second")
    client.text("credential", "delete", made["id"])


def domains(client):
    client.json("domain", "create", "branch")
    user = client.json("user", "create", "bea", "--domain", "branch")["id"]
    group = client.json("group", "create", "crew", "--domain", "branch")["id"]
    project = client.json("project", "create", "yard", "--domain", "branch")["id"]
    client.fails("1 of 1 domains failed", "domain", "delete", "branch")
    client.text("domain", "set", "branch", "--disable")
    client.text("domain", "delete", "branch")
    for kind, gone in (("user", user), ("group", group), ("project", project)):
        client.fails("No", kind, "show", gone)


def endpoint_filter(client, ada):
    def catalog(env=None):
        return {(service["Type"], end["interface"]) for service in client.json("catalog", "list", env=env)
            for end in service["Endpoints"]}

    every = catalog()
    same(catalog(ada), every)
    lab = client.json("project", "show", "lab")["id"]
    identity = client.json("endpoint", "list", "--service", "identity", "--interface", "public")[0]["ID"]
    client.text("endpoint", "add", "project", identity, "lab")
    same(catalog(ada), {("identity", "public")})
    same(column(client.json("endpoint", "list", "--project", "lab"), "ID"), [identity])
    same(column(client.json("endpoint", "list", "--endpoint", identity), "ID"), [lab])
    client.fails("409", "endpoint", "add", "project", identity, "lab")
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"interface": "internal"}, file)
        file.flush()
        made = client.json("endpoint", "group", "create", "inner", file.name, "--description", "d")
        same((made["name"], made["filters"]), ("inner", {"interface": "internal"}))
        client.text("endpoint", "group", "add", "project", "inner", "lab")
        same(catalog(ada), {one for one in every if one[1] == "internal"} | {("identity", "public")})
        same(column(client.json("endpoint", "group", "list"), "Name"), ["inner"])
        same(column(client.json("endpoint", "group", "list", "--project", "lab"), "Name"), ["inner"])
        same(column(client.json("endpoint", "group", "list", "--endpointgroup", "inner"), "Name"), ["lab"])
    client.text("endpoint", "group", "set", "inner", "--name", "within", "--description", "e")
    same(client.json("endpoint", "group", "show", "within")["description"], "e")
    client.text("endpoint", "group", "remove", "project", "within", "lab")
    same(catalog(ada), {("identity", "public")})
    client.text("endpoint", "remove", "project", identity, "lab")
    same(catalog(ada), every)
    client.text("endpoint", "group", "delete", "within")
    same(client.json("endpoint", "group", "list"), [])


def trusts(client, ada):
    bob = client.json("user", "create", "bob", "--password", "bob-password")["id"]
    lab = client.json("project", "show", "lab")["id"]
    reader = client.json("role", "show", "reader")["id"]
    admin = client.json("role", "show", "admin")["id"]
    user = client.json("token", "issue", env=ada)["user_id"]
    of_bob = {"OS_USERNAME": "bob", "OS_PASSWORD": "bob-password", "OS_PROJECT_NAME": ""}
    create = ("trust", "create", user, bob, "--project", lab)
    client.fails("404", *create, "--role", admin, env=ada)
    client.fails("403", *create, "--role", reader)
    made = client.json(*create, "--role", reader, "--impersonate", "--expiration", "2999-01-01T00:00:00", env=ada)
    same((made["trustor_user_id"], made["trustee_user_id"], made["is_impersonation"]), (user, bob, True))
    same((made["expires_at"], made["project_id"]), ("2999-01-01T00:00:00.000000Z", lab))
    same(column(made["roles"], "name"), ["reader"])
    trust = made["id"]
    same(column(client.json("trust", "list", "--trustor", user, env=ada), "ID"), [trust])
    same(column(client.json("trust", "list", "--auth-user", env=ada), "ID"), [trust])
    same(column(client.json("trust", "list"), "ID"), [trust])
    same(client.json("trust", "show", trust, env=ada)["trustee_user_id"], bob)
    issued = client.json("token", "issue", env=of_bob | {"OS_TRUST_ID": trust})
    same((issued["user_id"], issued["project_id"]), (user, lab))
    same(client.json("server", "list", env=of_bob | {"OS_TRUST_ID": trust}), [])
    client.fails("403", "network", "create", "forbidden", env=of_bob | {"OS_TRUST_ID": trust})
    client.text("trust", "delete", trust, env=ada)
    client.fails("401", "token", "issue", env=of_bob | {"OS_TRUST_ID": trust})
    same(client.json("trust", "list"), [])
    client.text("user", "delete", "bob")


def limits(client):
    made = client.json("registered", "limit", "create", "gpus", "--service", "nova", "--default-limit", "1")
    same((made["resource_name"], made["default_limit"]), ("gpus", 1))
    registered = made["id"]
    client.fails("409", "registered", "limit", "create", "gpus", "--service", "nova", "--default-limit", "2")
    client.json("registered", "limit", "set", registered, "--default-limit", "2")
    same(client.json("registered", "limit", "show", registered)["default_limit"], 2)
    made = client.json("limit", "create", "gpus", "--service", "nova", "--project", "lab", "--resource-limit", "8")
    same(made["resource_limit"], 8)
    client.json("limit", "set", made["id"], "--resource-limit", "9")
    same(column(client.json("limit", "list", "--project", "lab"), "Resource Limit"), [9])
    same(client.json("limit", "show", made["id"])["resource_limit"], 9)
    client.fails("403", "registered", "limit", "delete", registered)
    client.text("limit", "delete", made["id"])
    client.text("registered", "limit", "delete", registered)
    same(client.json("registered", "limit", "list"), [])


def image(client):
    with tempfile.NamedTemporaryFile() as disk:
        disk.write(b"\x07" * (1 << 20))
        disk.flush()
        made = client.json(
            "image", "create", "kernel", "--disk-format", "aki", "--container-format", "aki", "--file", client.kernel)
        same(made["status"], "active")
        made = client.json(
            "image", "create", "disk", "--disk-format", "raw", "--container-format", "bare", "--file", disk.name,
            "--property", f"kernel_id={made['id']}", "--property", "os_command_line=quiet", "--tag", "small")
        same((made["status"], made["size"], made["tags"]), ("active", 1 << 20, ["small"]))
    has(column(client.json("image", "list"), "Name"), "disk", "kernel")
    same(column(client.json("image", "list", "--name", "disk"), "Name"), ["disk"])
    same(column(client.json("image", "list", "--tag", "small"), "Name"), ["disk"])
    same(column(client.json("image", "list", "--status", "active", "--sort", "name:asc"), "Name"), ["disk", "kernel"])
    same(client.json("image", "list", "--property", "os_command_line=none"), [])
    shown = client.json("image", "show", "disk")
    same(shown["properties"]["os_command_line"], "quiet")
    client.text("image", "set", "disk", "--property", "color=blue", "--min-ram", "64", "--tag", "blue")
    shown = client.json("image", "show", "disk")
    same((shown["properties"]["color"], shown["min_ram"], sorted(shown["tags"])), ("blue", 64, ["blue", "small"]))
    client.text("image", "unset", "disk", "--property", "color", "--tag", "blue")
    shown = client.json("image", "show", "disk")
    same(("color" in shown["properties"], shown["tags"]), (False, ["small"]))
    client.text("image", "set", "disk", "--name", "renamed")
    client.text("image", "set", "renamed", "--name", "disk")
    client.text("image", "set", "disk", "--protected")
    client.fails("403", "image", "delete", "disk")
    client.text("image", "set", "disk", "--unprotected")
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "disk")
        client.text("image", "save", "--file", path, "disk")
        with open(path, "rb") as back:
            same(back.read() == b"\x07" * (1 << 20), True, "the bytes come back")
    client.text("image", "set", "disk", "--shared")
    client.text("project", "create", "friends")
    client.text("image", "add", "project", "disk", "friends")
    same(len(client.json("image", "member", "list", "disk")), 1, "members")
    same(client.json("image", "member", "get", "disk", client.json("project", "show", "friends")["id"])["status"], "pending")
    client.text("image", "remove", "project", "disk", "friends")
    same(client.json("image", "member", "list", "disk"), [])
    client.text("project", "delete", "friends")
    client.text("image", "set", "disk", "--deactivate")
    same(client.json("image", "show", "disk")["status"], "deactivated")
    client.text("image", "set", "disk", "--activate")
    same(client.json("image", "show", "disk")["status"], "active")
    imports(client)
    metadefs(client)
    queued = client.json("image", "create", "later", "--disk-format", "raw", "--container-format", "bare")
    same(queued["status"], "queued")
    client.text("image", "delete", "later")
    client.fails("No Image found", "image", "show", "later")


def metadefs(client):
    def metadef(*arguments):
        return ("image", "metadef", *arguments)

    has(column(client.json(*metadef("resource", "type", "list")), "Name"), "OS::Glance::Image", "OS::Nova::Flavor")
    name = "Own::Paint"
    made = client.json(*metadef("namespace", "create", name, "--public", "--display-name", "Paint", "--protected"))
    same((made["namespace"], made["visibility"], made["protected"]), (name, "public", True))
    client.fails("409", *metadef("namespace", "create", name))
    client.json(*metadef("resource", "type", "association", "create", name, "OS::Glance::Image"))
    same(column(client.json(*metadef("resource", "type", "association", "list", name)), "Name"), ["OS::Glance::Image"])
    same(column(client.json(*metadef("namespace", "list", "--resource-types", "OS::Glance::Image")), "namespace"), [name])
    same(client.json(*metadef("namespace", "list", "--visibility", "private")), [])
    schema = json.dumps({"enum": ["red", "blue"], "description": "of the coat"})
    made = client.json(*metadef("property", "create", name, "--name", "colour", "--title", "Colour", "--type", "string",
        "--schema", schema))
    same((made["name"], made["enum"]), ("colour", ["red", "blue"]))
    client.text(*metadef("property", "set", name, "colour", "--title", "Color"))
    shown = client.json(*metadef("property", "show", name, "colour"))
    same((shown["title"], shown["enum"], shown["description"]), ("Color", ["red", "blue"], "of the coat"))
    same(column(client.json(*metadef("property", "list", name)), "name"), ["colour"])
    client.json(*metadef("object", "create", "--namespace", name, "coat"))
    client.text(*metadef("object", "update", name, "coat", "--name", "layer"))
    same(client.json(*metadef("object", "show", name, "layer"))["name"], "layer")
    # The client has no words for the properties of an object.
    with openstack.connect() as cloud:
        cloud.image.update_metadef_object("layer", name, name="layer",
            properties={"depth": {"title": "Depth", "type": "integer"}})
    same(client.json(*metadef("object", "property", "show", name, "layer", "depth"))["title"], "Depth")
    same(column(client.json(*metadef("object", "list", name)), "name"), ["layer"])
    client.text(*metadef("namespace", "set", name, "--protected", "--tag", "wet"))
    same(column(client.json(*metadef("namespace", "show", name))["tags"], "name"), ["wet"])
    client.fails("1 of", *metadef("property", "delete", name, "colour"))
    client.fails("1 of 1", *metadef("namespace", "delete", name))
    client.text(*metadef("namespace", "set", name, "--unprotected", "--private"))
    client.text(*metadef("namespace", "unset", name, "--all-tags"))
    client.text(*metadef("property", "delete", name, "colour"))
    client.text(*metadef("object", "delete", name))
    client.text(*metadef("resource", "type", "association", "delete", name, "OS::Glance::Image"))
    shown = client.json(*metadef("namespace", "show", name))
    same((shown["visibility"], shown.get("properties")), ("private", None))
    # In one process the client shows tags that it has set once for ever.
    with openstack.connect() as cloud:
        same(cloud.image.get(f"/metadefs/namespaces/{name}/tags").json(), {"tags": []})
    client.text(*metadef("namespace", "delete", name))
    same(client.json(*metadef("namespace", "list")), [])


def imports(client):
    """qcow2 and ISO, and bytes that are staged and then imported."""
    methods = client.json("image", "import", "info")["import-methods"]
    has(methods if isinstance(methods, list) else methods["value"], "glance-direct")
    has(column(client.json("image", "stores", "list"), "ID"), "local")
    with tempfile.NamedTemporaryFile() as disk:
        disk.write(qcow2())
        disk.flush()
        made = client.json("image", "create", "q", "--disk-format", "qcow2", "--file", disk.name)
        same((made["status"], made["size"], made["virtual_size"]), ("active", 4 << 16, 8 << 16))
        client.json("image", "create", "staged", "--disk-format", "qcow2", "--container-format", "bare")
        client.text("image", "stage", "staged", "--file", disk.name)
        same(client.json("image", "show", "staged")["status"], "uploading")
        same(column(client.json("image", "list", "--status", "uploading"), "Name"), ["staged"])
        client.text("image", "import", "staged", "--method", "glance-direct")
        client.until("active", is_status("active"), "image", "show", "staged")
        tasks = client.json("image", "task", "list", "--sort-key", "created_at", "--sort-dir", "desc")
        same((tasks[0]["Type"], tasks[0]["Status"]), ("api_image_import", "success"))
        task = client.json("image", "task", "show", tasks[0]["ID"])
        same(task["status"], "success")
        disk.seek(8)
        disk.write(b"\0\0\0\0\0\0\0\xc8")
        disk.flush()
        client.fails("backing file", "image", "create", "based", "--disk-format", "qcow2", "--file", disk.name)
    client.fails("web-download", "image", "import", "staged", "--method", "web-download", "--uri", "http://cloud.example/x")
    with tempfile.NamedTemporaryFile() as disc:
        disc.write(b"\0" * 0x8001 + b"CD001" + b"\0" * 2042)
        disc.flush()
        made = client.json("image", "create", "disc", "--disk-format", "iso", "--file", disc.name)
        same(made["status"], "active")
    client.text("image", "set", "disc", "--hidden")
    same(column(client.json("image", "list", "--hidden"), "Name"), ["disc"])
    same(column(client.json("image", "list", "--name", "disc"), "Name"), [])
    disc = client.json("image", "list", "--hidden")[0]["ID"]
    client.text("image", "delete", "q", "staged", disc)


def qcow2():
    """A disk of 8 clusters of 64 KiB, of which the first is all 7."""
    head = struct.pack(">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, 0, 0, 16, 8 << 16, 0, 1, 1 << 16, 0, 0, 0, 0, 0, 0, 0, 4, 104)
    tables = [struct.pack(">Q", (number + 1) << 16) for number in (1, 2)]
    return b"".join(part.ljust(1 << 16, b"\0") for part in [head, *tables]) + b"\7" * (1 << 16)


def network(client):
    made = client.json("network", "create", "net", "--description", "one")
    same((made["name"], made["status"], made["description"]), ("net", "ACTIVE", "one"))
    has(column(client.json("network", "list"), "Name"), "net")
    same(client.json("network", "show", "net")["id"], made["id"])
    client.text("network", "set", "net", "--description", "two")
    same(client.json("network", "show", "net")["description"], "two")
    subnet = client.json(
        "subnet", "create", "sub", "--network", "net", "--subnet-range", "10.60.0.0/24", "--dns-nameserver", "192.0.2.53")
    same((subnet["gateway_ip"], subnet["dns_nameservers"]), ("10.60.0.1", ["192.0.2.53"]))
    client.fails("overlap", "subnet", "create", "again", "--network", "net", "--subnet-range", "10.60.0.0/25")
    has(column(client.json("subnet", "list", "--network", "net"), "Name"), "sub")
    same(client.json("subnet", "show", "sub")["cidr"], "10.60.0.0/24")
    client.text("subnet", "set", "sub", "--name", "sub2")
    client.text("subnet", "set", "sub2", "--name", "sub")
    port = client.json("port", "create", "extra", "--network", "net", "--fixed-ip", "subnet=sub,ip-address=10.60.0.77")
    same(port["fixed_ips"][0]["ip_address"], "10.60.0.77")
    client.fails("409", "port", "create", "twice", "--network", "net", "--fixed-ip", "subnet=sub,ip-address=10.60.0.77")
    same(column(client.json("port", "list", "--name", "extra"), "Name"), ["extra"])
    same(client.json("port", "show", "extra")["mac_address"], port["mac_address"])
    client.text("port", "set", "extra", "--description", "spare")
    same(client.json("port", "show", "extra")["description"], "spare")
    client.fails("409", "network", "delete", "net")
    has(column(client.json("extension", "list", "--network"), "Alias"), "quotas")
    routing(client)
    filters(client)


def routing(client):
    """Routers with several gateways, floating IPs and port forwardings."""
    for name, cidr in (("public", "203.0.113.0/24"), ("second", "198.18.0.0/24")):
        client.json("network", "create", name, "--external", "--provider-network-type", "flat",
            "--provider-physical-network", name)
        client.json("subnet", "create", name, "--network", name, "--subnet-range", cidr, "--no-dhcp")
    nets = {name: client.json("network", "show", name)["id"] for name in ("public", "second")}

    def gateways():
        shown = client.json("router", "show", "r")
        found = [gateway["network_id"] for gateway in shown["external_gateways"]]
        first = shown["external_gateway_info"]
        same(first and first["network_id"], found[0] if found else None)
        return found

    client.json("router", "create", "r", "--external-gateway", "public", "--external-gateway", "second")
    same(gateways(), [nets["public"], nets["second"]])
    has(column(client.json("router", "list"), "Name"), "r")
    client.text("router", "add", "subnet", "r", "sub")
    left = client.json("router", "remove", "gateway", "r", "second")
    same([gateway["network_id"] for gateway in left["external_gateways"]], [nets["public"]])
    client.fails("400", "router", "remove", "gateway", "r", "second")
    client.json("router", "add", "gateway", "r", "second", "--fixed-ip", "subnet=second,ip-address=198.18.0.50")
    same(gateways(), [nets["public"], nets["second"]])
    client.text("router", "set", "--enable-default-route-ecmp", "r")
    same(client.json("router", "show", "r")["enable_default_route_ecmp"], True)
    client.fails("enable_default_route_bfd", "router", "set", "--enable-default-route-bfd", "r")
    # Each floating IP needs the gateway on its own network.
    port = client.json("port", "create", "inside", "--network", "net")
    floating = client.json("floating", "ip", "create", "second", "--port", "inside")
    same(floating["port_id"], port["id"])
    client.fails("409", "router", "remove", "gateway", "r", "second")
    client.text("floating", "ip", "unset", "--port", floating["id"])
    forward = client.json("floating", "ip", "port", "forwarding", "create", floating["id"], "--port", "inside",
        "--internal-ip-address", port["fixed_ips"][0]["ip_address"], "--internal-protocol-port", "22",
        "--external-protocol-port", "2222", "--protocol", "tcp")
    same(len(client.json("floating", "ip", "port", "forwarding", "list", floating["id"])), 1)
    client.text("floating", "ip", "port", "forwarding", "delete", floating["id"], forward["id"])
    client.text("floating", "ip", "delete", floating["id"])
    client.text("router", "set", "--external-gateway", "second", "r")
    same(gateways(), [nets["second"]])
    client.json("router", "add", "route", "r", "--route", "destination=192.0.2.0/24,gateway=10.60.0.9")
    client.json("router", "remove", "route", "r", "--route", "destination=192.0.2.0/24,gateway=10.60.0.9")
    client.text("router", "unset", "--external-gateway", "r")
    same(gateways(), [])
    client.text("router", "remove", "subnet", "r", "sub")
    client.text("router", "delete", "r")
    client.text("port", "delete", "inside")
    for name in nets:
        client.text("network", "delete", name)


def filters(client):
    """Security groups, address groups, QoS, sharing, pools, quotas, views."""
    client.json("address", "group", "create", "friends", "--address", "192.0.2.0/24")
    client.text("address", "group", "set", "--address", "198.51.100.7", "friends")
    same(len(client.json("address", "group", "show", "friends")["addresses"]), 2)
    client.json("security", "group", "create", "web", "--description", "one", "--stateful")
    rule = client.json("security", "group", "rule", "create", "web", "--protocol", "tcp", "--dst-port", "80:81",
        "--remote-address-group", "friends")
    same((rule["port_range_min"], rule["port_range_max"]), (80, 81))
    client.json("security", "group", "rule", "create", "web", "--protocol", "icmp", "--icmp-type", "8", "--remote-group", "web")
    client.fails("409", "security", "group", "rule", "create", "web", "--protocol", "icmp", "--icmp-type", "8", "--remote-group", "web")
    same(len(client.json("security", "group", "rule", "list", "web")), 4)
    client.text("security", "group", "set", "web", "--name", "http")
    client.json("port", "create", "filtered", "--network", "net", "--security-group", "http", "--allowed-address", "ip-address=10.60.0.99")
    client.fails("409", "security", "group", "delete", "http")
    client.text("port", "set", "filtered", "--no-security-group", "--no-allowed-address")
    client.text("port", "set", "filtered", "--disable-port-security")
    same(client.json("port", "show", "filtered")["port_security_enabled"], False)
    client.json("network", "qos", "policy", "create", "slow", "--share")
    client.json("network", "qos", "rule", "create", "slow", "--type", "bandwidth-limit", "--max-kbps", "1000", "--egress")
    client.json("network", "qos", "rule", "create", "slow", "--type", "dscp-marking", "--dscp-mark", "26")
    same(len(client.json("network", "qos", "rule", "list", "slow")), 2)
    has(column(client.json("network", "qos", "rule", "type", "list"), "Type"), "bandwidth_limit", "dscp_marking")
    client.text("port", "set", "filtered", "--qos-policy", "slow")
    client.fails("409", "network", "qos", "policy", "delete", "slow")
    client.text("port", "unset", "filtered", "--qos-policy")
    client.text("network", "qos", "policy", "delete", "slow")
    client.text("port", "delete", "filtered")
    client.text("security", "group", "delete", "http")
    client.text("address", "group", "delete", "friends")
    shared = client.json("network", "rbac", "create", "--type", "network", "--action", "access_as_shared", "--target-all-projects", "net")
    same(client.json("network", "show", "net")["shared"], True)
    client.text("network", "rbac", "delete", shared["id"])
    client.json("subnet", "pool", "create", "pool", "--pool-prefix", "10.128.0.0/16", "--default-prefix-length", "26")
    client.json("network", "create", "pooled")
    taken = client.json("subnet", "create", "taken", "--network", "pooled", "--subnet-pool", "pool")
    same(taken["cidr"].split("/")[1], "26")
    client.text("network", "delete", "pooled")
    client.text("subnet", "pool", "delete", "pool")
    client.text("network", "set", "net", "--tag", "blue")
    has(column(client.json("network", "list", "--tags", "blue"), "Name"), "net")
    client.text("network", "unset", "net", "--all-tag")
    client.json("network", "agent", "list")
    client.json("ip", "availability", "list")
    client.json("availability", "zone", "list", "--network")
    client.json("quota", "show", "--network")


def compute(client):
    flavors_and_keys(client)
    server_life(client)
    server_actions(client)
    around_servers(client)


def flavors_and_keys(client):
    has(column(client.json("flavor", "list"), "Name"), "m1.nano", "m1.small")
    made = client.json("flavor", "create", "tall", "--id", "tall", "--vcpus", "2", "--ram", "256", "--disk", "0",
                       "--description", "for tests", "--property", "a=b")
    same((made["vcpus"], made["ram"], made["description"]), (2, 256, "for tests"))
    client.fails("409", "flavor", "create", "tall", "--vcpus", "2", "--ram", "256")
    same(client.json("flavor", "show", "tall")["properties"], {"a": "b"})
    client.text("flavor", "set", "tall", "--property", "c=d")
    same(client.json("flavor", "show", "tall")["properties"], {"a": "b", "c": "d"})
    client.fails("quota:disk_total_bytes_sec", "flavor", "set", "tall", "--property", "quota:disk_read_bytes_sec=1000")
    client.text("flavor", "unset", "tall", "--property", "a")
    same(client.json("flavor", "show", "tall")["properties"], {"c": "d"})
    client.text("flavor", "set", "tall", "--description", "taller")
    same(client.json("flavor", "show", "tall")["description"], "taller")
    client.json("flavor", "create", "own", "--id", "own", "--vcpus", "1", "--ram", "64", "--private", "--project", "admin")
    same(client.json("flavor", "show", "own")["os-flavor-access:is_public"], False)
    client.text("flavor", "unset", "own", "--project", "admin")
    client.text("flavor", "delete", "own")
    client.fails("No Flavor found", "flavor", "show", "own")
    with tempfile.NamedTemporaryFile("w") as key:
        key.write("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl test\n")
        key.flush()
        made = client.json("keypair", "create", "key", "--public-key", key.name)
        same((made["name"], made["type"]), ("key", "ssh"))
    same(column(client.json("keypair", "list"), "Name"), ["key"])
    same(client.json("keypair", "show", "key")["fingerprint"], made["fingerprint"])
    same(client.text("keypair", "show", "--public-key", "key").startswith("ssh-ed25519 "), True, "public key")
    made = client.json("server", "group", "create", "apart", "--policy", "anti-affinity")
    same(made["policy"], "anti-affinity")
    same(column(client.json("server", "group", "list"), "Name"), ["apart"])
    same(client.json("server", "group", "show", "apart")["members"], [])


def server_life(client):
    group = client.json("server", "group", "show", "apart")["id"]
    servers = []
    for name in ["web", "db"]:
        made = client.json(
            "server", "create", name, "--image", "disk", "--flavor", "m1.nano", "--network", "net", "--key-name", "key",
            "--property", "role=" + name, "--hint", f"group={group}", "--tag", "prod", "--description", "a " + name,
            "--os-compute-api-version", "2.90", "--wait")
        same((made["status"], made["description"]), ("ACTIVE", "a " + name))
        servers.append(made)
    hosts = {server["OS-EXT-SRV-ATTR:host"] for server in servers}
    same(len(hosts), 2, "hosts of a group that is apart")
    made = client.json("server", "create", "third", "--image", "disk", "--flavor", "m1.nano", "--network", "net",
                       "--hint", f"group={group}")
    client.until("in error", lambda found: found["status"] == "ERROR", "server", "show", "third")
    fault = client.json("server", "show", "third")["fault"]
    has(fault["message"], "No valid host was found")
    client.text("server", "delete", "third", "--wait")
    made = client.json("server", "create", "driven", "--image", "disk", "--flavor", "m1.nano", "--network", "net",
                       "--config-drive", "true", "--wait")
    same((made["status"], made["config_drive"]), ("ACTIVE", "True"))
    client.text("server", "delete", "driven", "--wait")
    same(sorted(column(client.json("server", "list"), "Name")), ["db", "web"])
    rows = client.json("server", "list", "--long", "--name", "web")
    same((rows[0]["Image Name"], rows[0]["Flavor"], rows[0]["Power State"]), ("disk", "m1.nano", 1))
    same(column(client.json("server", "list", "--status", "SHUTOFF"), "Name"), [])
    same(sorted(column(client.json("server", "list", "--tags", "prod"), "Name")), ["db", "web"])
    same(len(client.json("server", "list", "--limit", "1")), 1, "limit")
    same(column(client.json("server", "list", "--sort-column", "Name"), "Name"), ["db", "web"])
    same(len(client.json("server", "list", "--all-projects", "--flavor", "m1.nano")), 2, "of a flavor")
    shown = client.json("server", "show", "web")
    same((shown["properties"]["role"], shown["key_name"]), ("web", "key"))
    same(shown["addresses"]["net"][0].startswith("10.60.0."), True, "address")
    client.text("server", "set", "web", "--property", "color=blue", "--description", "blue", "--tag", "new")
    shown = client.json("server", "show", "web")
    same((shown["properties"]["color"], shown["description"], sorted(shown["tags"])), ("blue", "blue", ["new", "prod"]))
    client.text("server", "unset", "web", "--property", "color", "--tag", "new")
    shown = client.json("server", "show", "web")
    same(("color" in shown["properties"], shown["tags"]), (False, ["prod"]))
    client.text("server", "set", "web", "--name", "www")
    client.text("server", "set", "www", "--name", "web")
    has(client.text("console", "log", "show", "web"), "simulated guest of server")
    shown = client.json("console", "url", "show", "--serial", "web")
    same((shown["protocol"], shown["type"]), ("serial", "serial"))
    has(shown["url"], "ws://", "/mote/v1/serial-console?token=")
    client.fails("400", "console", "url", "show", "--novnc", "web")
    same(len(client.json("port", "list", "--server", "web")), 1, "ports")
    client.fails("No Image found", "server", "create", "x", "--image", "none", "--flavor", "m1.nano", "--network", "net")
    client.fails("No Flavor found", "server", "create", "x", "--image", "disk", "--flavor", "none", "--network", "net")
    client.fails("No Network", "server", "create", "x", "--image", "disk", "--flavor", "m1.nano", "--network", "none")


def is_status(*wanted):
    return lambda found: found["status"] in wanted


def server_actions(client):
    def until(status):
        return client.until(status, is_status(status), "server", "show", "web")

    client.text("server", "stop", "web")
    until("SHUTOFF")
    client.fails("409", "server", "stop", "web")
    client.text("server", "start", "web")
    until("ACTIVE")
    client.text("server", "reboot", "web", "--wait")
    client.text("server", "reboot", "--hard", "web", "--wait")
    until("ACTIVE")
    client.text("server", "pause", "web")
    until("PAUSED")
    client.fails("409", "server", "pause", "web")
    client.text("server", "unpause", "web")
    until("ACTIVE")
    client.text("server", "lock", "web", "--reason", "audit")
    shown = client.json("server", "show", "web")
    same((shown["locked"], shown["locked_reason"]), (True, "audit"))
    same(column(client.json("server", "list", "--locked"), "Name"), ["web"])
    client.text("server", "unlock", "web")
    same(client.json("server", "show", "web")["locked"], False)
    rebuilt = client.json("server", "rebuild", "web", "--image", "disk", "--wait")
    same(rebuilt["id"], client.json("server", "show", "web")["id"])
    until("ACTIVE")
    client.text("server", "resize", "web", "--flavor", "tall", "--wait")
    shown = until("VERIFY_RESIZE")
    has(json.dumps(shown["flavor"]), "tall")
    client.text("server", "resize", "revert", "web")
    has(json.dumps(until("ACTIVE")["flavor"]), "m1.nano")
    client.text("server", "resize", "web", "--flavor", "tall", "--wait")
    client.text("server", "resize", "confirm", "web")
    has(json.dumps(until("ACTIVE")["flavor"]), "tall")
    rows = client.json("server", "migration", "list", "--server", "web")
    same(column(rows, "Status"), ["confirmed", "reverted"])
    same(set(column(rows, "Type")), {"resize"})
    same(client.json("server", "migration", "list", "--type", "live-migration"), [])
    client.fails("No ServerMigration found", "server", "migration", "show", "web", str(rows[0]["Id"]))
    client.text("server", "rescue", "web", "--image", "disk")
    until("RESCUE")
    client.text("server", "unrescue", "web")
    until("ACTIVE")
    made = client.json("server", "image", "create", "web", "--name", "copy", "--wait")
    same(made["name"], "copy")
    copy = client.until("active", is_status("active"), "image", "show", "copy")
    same((copy["size"], copy["properties"]["image_type"]), (1 << 20, "snapshot"))
    made = client.json("server", "create", "clone", "--image", "copy", "--flavor", "m1.nano", "--network", "net", "--wait")
    same(made["status"], "ACTIVE")
    client.text("server", "delete", "clone", "--wait")
    client.text("image", "delete", "copy")
    addresses = client.json("server", "show", "web")["addresses"]
    client.text("server", "shelve", "web")
    until("SHELVED_OFFLOADED")
    client.text("server", "unshelve", "web")
    same(until("ACTIVE")["addresses"], addresses)
    for number in range(3):
        client.json("server", "backup", "create", "web", "--name", f"daily-{number}", "--type", "daily", "--rotate", "2", "--wait")
        until("ACTIVE")
    rows = client.json("image", "list", "--property", "backup_type=daily", "--long")
    same(sorted(column(rows, "Name")), ["daily-1", "daily-2"])
    shown = client.json("image", "show", "daily-2")["properties"]
    same((shown["image_type"], shown["instance_uuid"]), ("backup", rebuilt["id"]))
    client.text("image", "delete", "daily-1", "daily-2")
    client.text("server", "suspend", "web")
    until("SUSPENDED")
    client.fails("409", "server", "pause", "web")
    client.json("server", "image", "create", "web", "--name", "asleep", "--wait")
    until("SUSPENDED")
    same(client.json("image", "show", "asleep")["size"], 1 << 20)
    client.text("image", "delete", "asleep")
    client.text("server", "resume", "web")
    until("ACTIVE")
    client.fails("501", "server", "migrate", "web")
    client.text("server", "stop", "web")
    until("SHUTOFF")
    client.text("server", "add", "port", "web", "extra")
    has(client.json("server", "show", "web")["addresses"]["net"], "10.60.0.77")
    client.text("server", "remove", "port", "web", "extra")
    client.text("server", "add", "network", "web", "net")
    same(len(client.json("port", "list", "--server", "web")), 2, "ports after another NIC")
    client.text("server", "start", "web")
    until("ACTIVE")
    nics_of_a_running_server(client)
    actions = client.json("server", "event", "list", "web")
    has(column(actions, "Action"), "create", "stop", "start", "reboot", "pause", "resize", "rescue", "shelve", "suspend",
        "resume", "attach_interface", "detach_interface")
    request = actions[0]["Request ID"]
    same(client.json("server", "event", "show", "web", request)["action"], actions[0]["Action"])


def nics_of_a_running_server(client):
    def ports():
        return column(client.json("port", "list", "--server", "web"), "ID")

    before = ports()
    client.text("server", "add", "port", "web", "extra")
    client.until("plugged in", is_status("ACTIVE"), "port", "show", "extra")
    has(client.json("server", "show", "web")["addresses"]["net"], "10.60.0.77")
    client.text("server", "remove", "port", "web", "extra")
    kept = client.until("unplugged", lambda port: port["device_id"] == "", "port", "show", "extra")
    same((kept["status"], kept["name"]), ("DOWN", "extra"))
    client.text("server", "add", "network", "web", "net")
    made, = set(ports()) - set(before)
    client.until("plugged in", is_status("ACTIVE"), "port", "show", made)
    # A port that is deleted leaves its server; until it has, it is there.
    client.text("port", "delete", made)
    client.until("gone", lambda rows: made not in column(rows, "ID"), "port", "list", "--server", "web")


def local_disks(client):
    made = client.json("flavor", "create", "roomy", "--vcpus", "1", "--ram", "64", "--ephemeral", "2", "--swap", "64")
    same((made["OS-FLV-EXT-DATA:ephemeral"], made["swap"]), (2, 64))
    made = client.json("server", "create", "roomy", "--image", "disk", "--flavor", "roomy", "--network", "net",
                       "--ephemeral", "size=1", "--ephemeral", "size=1", "--swap", "32", "--wait")
    same(made["status"], "ACTIVE")
    client.fails("larger than", "server", "create", "x", "--image", "disk", "--flavor", "roomy", "--network", "net",
                 "--swap", "65")
    client.text("server", "delete", "roomy", "--wait")
    client.text("flavor", "delete", "roomy")


def aggregates(client, host):
    made = client.json("aggregate", "create", "fast", "--zone", "east", "--property", "disk=ssd")
    same((made["name"], made["availability_zone"], made["hosts"]), ("fast", "east", []))
    client.fails("409", "aggregate", "create", "fast")
    client.fails("409", "aggregate", "add", "host", "fast", host)  # it has servers, which stay in their zone
    client.text("aggregate", "unset", "fast", "--property", "availability_zone")
    same(client.json("aggregate", "add", "host", "fast", host)["hosts"], [host])
    client.fails("409", "aggregate", "add", "host", "fast", host)
    same(client.json("hypervisor", "show", host)["aggregates"], ["fast"])
    client.text("aggregate", "set", "fast", "--name", "faster", "--property", "rack=7")
    shown = client.json("aggregate", "show", "faster")
    same((shown["properties"], shown["hosts"]), ({"disk": "ssd", "rack": "7"}, [host]))
    has(column(client.json("aggregate", "list", "--long"), "Name"), "faster")
    client.json("flavor", "create", "picky", "--vcpus", "1", "--ram", "64", "--property",
                "aggregate_instance_extra_specs:rack=7")
    made = client.json("server", "create", "picked", "--image", "disk", "--flavor", "picky", "--network", "net", "--wait")
    same(made["OS-EXT-SRV-ATTR:host"], host)
    client.text("server", "delete", "picked", "--wait")
    client.text("aggregate", "unset", "faster", "--property", "rack")
    made = client.json("server", "create", "lost", "--image", "disk", "--flavor", "picky", "--network", "net")
    client.until("in error", lambda found: found["status"] == "ERROR", "server", "show", "lost")
    client.text("server", "delete", "lost", "--wait")
    client.text("flavor", "delete", "picky")
    client.fails("400", "aggregate", "delete", "faster")
    same(client.json("aggregate", "remove", "host", "faster", host)["hosts"], [])
    client.text("aggregate", "delete", "faster")
    same(client.json("aggregate", "list"), [])


def around_servers(client):
    rows = client.json("hypervisor", "list")
    same(len(rows), 2, "hypervisors")
    name = rows[0]["Hypervisor Hostname"]
    shown = client.json("hypervisor", "show", name)
    same((shown["hypervisor_hostname"], shown["state"], shown["aggregates"]), (name, "up", []))
    has(column(client.json("hypervisor", "list", "--matching", name), "Hypervisor Hostname"), name)
    aggregates(client, name)
    local_disks(client)
    rows = client.json("compute", "service", "list")
    same(column(rows, "State"), ["up", "up"])
    client.text("compute", "service", "set", "--disable", "--disable-reason", "disk", name, "nova-compute")
    rows = client.json("compute", "service", "list", "--host", name, "--long")
    same((rows[0]["Status"], rows[0]["Disabled Reason"]), ("disabled", "disk"))
    client.text("compute", "service", "set", "--enable", name, "nova-compute")
    same(client.json("compute", "service", "list", "--host", name)[0]["Status"], "enabled")
    zones = client.json("availability", "zone", "list", "--compute")
    has(column(zones, "Zone Name"), "nova")
    quota = {row["Resource"]: row["Limit"] for row in client.json("quota", "show", "--compute")}
    same((quota["instances"], quota["cores"]), (10, 20))
    client.text("quota", "set", "--class", "--cores", "30", "default")
    quota = {row["Resource"]: row["Limit"] for row in client.json("quota", "show", "--compute")}
    same((quota["instances"], quota["cores"]), (10, 30))
    client.text("quota", "set", "--class", "--cores", "20", "default")
    client.text("quota", "set", "--instances", "2", "admin")
    client.fails("Quota exceeded", "server", "create", "x", "--image", "disk", "--flavor", "m1.nano", "--network", "net")
    client.text("quota", "set", "--instances", "20", "admin")
    limits = {row["Name"]: row["Value"] for row in client.json("limits", "show", "--absolute")}
    same((limits["max_total_instances"], limits["total_instances_used"]), (20, 2))
    usage = client.json("usage", "show", "--project", "admin")
    same(len(usage["Servers"]) >= 2, True, "servers in the usage")
    has(column(client.json("usage", "list"), "Project"), client.json("project", "show", "admin")["id"])
    deleted = client.json("server", "show", "web")["id"]
    client.fails("409", "server", "restore", "web")
    client.text("server", "delete", "web", "db", "--wait")
    same(client.json("server", "list"), [])
    client.fails("No Server found", "server", "show", "web")
    rows = client.json("server", "list", "--deleted", "--long")
    same({row["Status"] for row in rows}, {"DELETED"})
    has(column(rows, "Name"), "web", "db")
    has(column(client.json("server", "event", "list", deleted), "Action"), "create", "delete", "rescue")
    client.text("server", "group", "delete", "apart")
    client.text("keypair", "delete", "key")
    same(client.json("keypair", "list"), [])
    client.text("flavor", "delete", "tall")
    client.text("port", "delete", "extra")
    client.text("subnet", "delete", "sub")
    client.text("network", "delete", "net")
    client.fails("No Network", "network", "show", "net")
    client.text("image", "delete", "disk", "kernel")
    same(client.json("image", "list"), [])


PARTS = {"identity": identity, "image": image, "network": network, "compute": compute, **openstack_breadth.PARTS}

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    CLIENT = Client(sys.argv[1])
    for wanted in sys.argv[2:] or PARTS:
        CLIENT.part(wanted, PARTS[wanted])
    if not sys.argv[2:] and not CLIENT.failures:
        CLIENT.part("completeness", complete)
    for failure in CLIENT.failures:
        print(f"FAILED {failure}")
    print(f"{CLIENT.commands} commands in {CLIENT.seconds:.0f} s, {len(CLIENT.failures)} parts failed")
    sys.exit(1 if CLIENT.failures else 0)
