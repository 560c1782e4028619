"""Commands of the client that the lives in openstack_commands.py don't pass through: each resource once, from its creation to
its end, and views. Run after those parts; every function leaves the cloud as it found it."""

import json
import tempfile

from openstack_client import column, has, same


def catalog(client):
    """Regions, services and endpoints are data."""
    client.json("region", "create", "West", "--description", "one")
    client.text("region", "set", "West", "--description", "two")
    same(client.json("region", "show", "West")["description"], "two")
    made = client.json("service", "create", "object-store", "--name", "objects")
    client.text("service", "set", "objects", "--description", "things", "--disable")
    shown = client.json("service", "show", "objects")
    same((shown["type"], shown["description"], shown["enabled"]), ("object-store", "things", False))
    client.text("service", "set", "objects", "--enable")
    end = client.json("endpoint", "create", "objects", "public", "http://objects.example/v1", "--region", "West")
    same((end["interface"], end["service_id"]), ("public", made["id"]))
    has(column(client.json("catalog", "list"), "Type"), "object-store")
    client.text("endpoint", "set", end["id"], "--url", "http://objects.example/v2", "--disable")
    shown = client.json("endpoint", "show", end["id"])
    same((shown["url"], shown["enabled"]), ("http://objects.example/v2", False))
    client.text("endpoint", "delete", end["id"])
    client.text("service", "delete", "objects")
    client.text("region", "delete", "West")
    client.fails("Could not find", "region", "show", "West")
    versions = client.json("versions", "show")
    has(column(versions, "Service Type"), "compute", "identity", "image", "network")
    same(client.json("configuration", "show")["password"], "<redacted>")


def roles(client):
    """Domains, groups, roles that imply others."""
    client.json("domain", "create", "eu", "--description", "one")
    client.text("domain", "set", "eu", "--description", "two", "--disable")
    shown = client.json("domain", "show", "eu")
    same((shown["description"], shown["enabled"]), ("two", False))
    client.text("domain", "delete", "eu")
    role = client.json("role", "create", "auditor", "--description", "one")
    client.text("role", "set", "auditor", "--name", "inspector")
    same(client.json("role", "show", "inspector")["id"], role["id"])
    client.json("implied", "role", "create", "inspector", "--implied-role", "reader")
    has(column(client.json("implied", "role", "list"), "Prior Role Name"), "inspector")
    client.json("user", "create", "eve", "--password", "eve-password")
    client.json("group", "create", "inspectors")
    client.text("group", "set", "inspectors", "--description", "two")
    same(client.json("group", "show", "inspectors")["description"], "two")
    has(column(client.json("group", "list"), "Name"), "inspectors")
    client.text("group", "add", "user", "inspectors", "eve")
    has(client.text("group", "contains", "user", "inspectors", "eve"), "eve in group")
    client.text("role", "add", "--group", "inspectors", "--project", "admin", "inspector")
    eve = {"OS_USERNAME": "eve", "OS_PASSWORD": "eve-password"}
    rows = client.json("role", "assignment", "list", "--user", "eve", "--effective", "--names")
    same(sorted(row.split("@")[0] for row in column(rows, "Role")), ["inspector", "reader"])
    client.text("user", "password", "set", "--original-password", "eve-password", "--password", "next-password", env=eve)
    client.fails("401", "token", "issue", env=eve)
    eve["OS_PASSWORD"] = "next-password"
    client.json("token", "issue", env=eve)
    client.text("group", "remove", "user", "inspectors", "eve")
    client.fails("401", "token", "issue", env=eve)
    client.text("implied", "role", "delete", "inspector", "--implied-role", "reader")
    client.text("role", "delete", "inspector")
    client.text("group", "delete", "inspectors")
    client.text("user", "delete", "eve")


def credentials(client):
    """Credentials, EC2's keys, application credentials and the rules of what they may ask."""
    made = client.json("credential", "create", "admin", "a secret", "--type", "cert")
    has(column(client.json("credential", "list", "--type", "cert"), "ID"), made["id"])
    client.text("credential", "set", made["id"], "--user", "admin", "--type", "cert", "--data", "another")
    same(client.json("credential", "show", made["id"])["blob"], "another")
    client.text("credential", "delete", made["id"])
    made = client.json("ec2", "credentials", "create")
    has(column(client.json("ec2", "credentials", "list"), "Access"), made["access"])
    same(client.json("ec2", "credentials", "show", made["access"])["secret"], made["secret"])
    client.text("ec2", "credentials", "delete", made["access"])
    rules = [{"service": "compute", "method": "GET", "path": "/v2.1/servers"}]
    with tempfile.NamedTemporaryFile("w") as file:
        json.dump(rules, file)
        file.flush()
        made = client.json("application", "credential", "create", "robot", "--role", "reader", "--secret", "robots-secret",
                           "--access-rules", file.name)
    has(column(client.json("application", "credential", "list"), "Name"), "robot")
    same(client.json("application", "credential", "show", "robot")["ID"], made["ID"])
    robot = {"OS_AUTH_TYPE": "v3applicationcredential", "OS_APPLICATION_CREDENTIAL_ID": made["ID"],
        "OS_APPLICATION_CREDENTIAL_SECRET": "robots-secret", "OS_USERNAME": "", "OS_PASSWORD": "", "OS_PROJECT_NAME": "",
        "OS_USER_DOMAIN_NAME": "", "OS_PROJECT_DOMAIN_NAME": ""}
    client.json("token", "issue", env=robot)
    client.fails("401", "network", "list", env=robot)
    client.text("application", "credential", "delete", "robot")
    client.fails("401", "token", "issue", env=robot)
    rule = next(row for row in client.json("access", "rule", "list") if row["Path"] == "/v2.1/servers")
    same(client.json("access", "rule", "show", rule["ID"])["Method"], "GET")
    client.text("access", "rule", "delete", rule["ID"])


def networks(client):
    """What remains of networks, routers, subnets, ports, floating IPs, security groups and QoS."""
    client.json("network", "create", "wide")
    client.json("subnet", "create", "wide", "--network", "wide", "--subnet-range", "10.61.0.0/24",
        "--allocation-pool", "start=10.61.0.10,end=10.61.0.90", "--tag", "blue")
    client.text("subnet", "unset", "wide", "--allocation-pool", "start=10.61.0.10,end=10.61.0.90", "--all-tag")
    shown = client.json("subnet", "show", "wide")
    same((shown["allocation_pools"], shown["tags"]), ([], []))
    client.text("subnet", "set", "wide", "--allocation-pool", "start=10.61.0.20,end=10.61.0.99")
    made = client.json("network", "show", "wide")["id"]
    shown = client.json("ip", "availability", "show", "wide")
    same((shown["network_id"], shown["total_ips"]), (made, 80))
    port = client.json("port", "create", "leg", "--network", "wide", "--fixed-ip", "ip-address=10.61.0.1")
    client.json("router", "create", "hub")
    client.text("router", "add", "port", "hub", "leg")
    same(client.json("port", "show", "leg")["device_owner"].startswith("network:router_interface"), True)
    client.text("router", "remove", "port", "hub", "leg")
    client.fails("No Port found", "port", "show", port["id"])
    client.json("network", "create", "outside", "--external", "--provider-network-type", "flat", "--provider-physical-network", "o")
    client.json("subnet", "create", "outside", "--network", "outside", "--subnet-range", "203.0.113.0/24", "--no-dhcp")
    client.text("router", "set", "hub", "--external-gateway", "outside")
    client.text("router", "add", "subnet", "hub", "wide")
    floating = client.json("floating", "ip", "create", "outside")["id"]
    client.json("port", "create", "inner", "--network", "wide")
    client.text("floating", "ip", "set", "--port", "inner", "--description", "door", floating)
    shown = client.json("floating", "ip", "show", floating)
    same((shown["description"], shown["port_details"]["name"]), ("door", "inner"))
    has(column(client.json("floating", "ip", "list", "--network", "outside"), "ID"), floating)
    client.text("floating", "ip", "unset", "--port", floating)
    inner = client.json("port", "show", "inner")["fixed_ips"][0]["ip_address"]
    forward = client.json("floating", "ip", "port", "forwarding", "create", floating, "--port", "inner",
        "--internal-ip-address", inner, "--internal-protocol-port", "22", "--external-protocol-port", "2222", "--protocol", "tcp")
    client.text("floating", "ip", "port", "forwarding", "set", "--external-protocol-port", "2022", floating, forward["id"])
    same(client.json("floating", "ip", "port", "forwarding", "show", floating, forward["id"])["external_port"], 2022)
    client.text("floating", "ip", "port", "forwarding", "delete", floating, forward["id"])
    client.text("floating", "ip", "delete", floating)
    client.text("port", "delete", "inner")
    client.text("router", "remove", "subnet", "hub", "wide")
    client.text("router", "delete", "hub")
    client.text("network", "delete", "wide", "outside")
    host = client.json("network", "agent", "list")[0]
    same(client.json("network", "agent", "show", host["ID"])["host"], host["Host"])
    same(client.json("extension", "show", "port-security")["alias"], "port-security")


def groups(client):
    """What remains of security groups, address groups, QoS, sharing, pools and quotas."""
    client.json("security", "group", "create", "web", "--tag", "blue")
    has(column(client.json("security", "group", "list"), "Name"), "web", "default")
    rule = client.json("security", "group", "rule", "create", "web", "--protocol", "udp", "--dst-port", "53", "--ethertype", "IPv6")
    same(client.json("security", "group", "rule", "show", rule["id"])["ether_type"], "IPv6")
    has(column(client.json("security", "group", "show", "web")["rules"], "id"), rule["id"])
    client.text("security", "group", "rule", "delete", rule["id"])
    client.text("security", "group", "unset", "web", "--all-tag")
    same(client.json("security", "group", "show", "web")["tags"], [])
    client.text("security", "group", "delete", "web")
    client.json("address", "group", "create", "friends", "--address", "192.0.2.0/24", "--address", "198.51.100.0/24")
    client.text("address", "group", "unset", "friends", "--address", "192.0.2.0/24")
    rows = client.json("address", "group", "list")
    same((column(rows, "Name"), column(rows, "Addresses")), (["friends"], [["198.51.100.0/24"]]))
    client.text("address", "group", "delete", "friends")
    client.json("network", "qos", "policy", "create", "slow")
    client.text("network", "qos", "policy", "set", "slow", "--description", "slower")
    has(column(client.json("network", "qos", "policy", "list"), "Name"), "slow")
    rule = client.json("network", "qos", "rule", "create", "slow", "--type", "bandwidth-limit", "--max-kbps", "1000", "--ingress")
    client.text("network", "qos", "rule", "set", "slow", rule["id"], "--max-kbps", "2000", "--max-burst-kbits", "1600")
    shown = client.json("network", "qos", "rule", "show", "slow", rule["id"])
    same((shown["max_kbps"], shown["max_burst_kbps"], shown["direction"]), (2000, 1600, "ingress"))
    same(client.json("network", "qos", "policy", "show", "slow")["rules"][0]["id"], rule["id"])
    client.text("network", "qos", "rule", "delete", "slow", rule["id"])
    client.text("network", "qos", "policy", "delete", "slow")
    same(client.json("network", "qos", "rule", "type", "show", "dscp_marking")["rule_type_name"], "dscp_marking")
    client.json("network", "create", "lent")
    project = client.json("project", "create", "borrower")["id"]
    shared = client.json("network", "rbac", "create", "--type", "network", "--action", "access_as_shared", "--target-project",
        "admin", "lent")
    has(column(client.json("network", "rbac", "list"), "ID"), shared["id"])
    client.text("network", "rbac", "set", "--target-project", "borrower", shared["id"])
    same(client.json("network", "rbac", "show", shared["id"])["target_project_id"], project)
    client.text("network", "rbac", "delete", shared["id"])
    client.text("network", "delete", "lent")
    client.json("subnet", "pool", "create", "pool", "--pool-prefix", "10.129.0.0/16", "--tag", "blue")
    client.text("subnet", "pool", "set", "pool", "--default-prefix-length", "27", "--pool-prefix", "10.130.0.0/16")
    client.text("subnet", "pool", "unset", "pool", "--all-tag")
    has(column(client.json("subnet", "pool", "list"), "Name"), "pool")
    shown = client.json("subnet", "pool", "show", "pool")
    same((shown["default_prefixlen"], shown["tags"], len(shown["prefixes"])), (27, [], 2))
    client.text("subnet", "pool", "delete", "pool")
    client.text("quota", "set", "--networks", "3", "--cores", "4", "borrower")
    has(column(client.json("quota", "list", "--network"), "Project ID"), project)
    has(column(client.json("quota", "list", "--compute"), "Project ID"), project)
    client.text("quota", "delete", "borrower")
    same(project in column(client.json("quota", "list", "--compute"), "Project ID"), False)
    client.text("project", "delete", "borrower")


def servers(client):
    """Addresses, groups and networks of a server by the client's shorter commands, and its console's token."""
    client.json("network", "create", "near")
    client.json("subnet", "create", "near", "--network", "near", "--subnet-range", "10.62.0.0/24")
    client.json("network", "create", "sky", "--external", "--provider-network-type", "flat", "--provider-physical-network", "sky")
    client.json("subnet", "create", "sky", "--network", "sky", "--subnet-range", "203.0.113.0/24", "--no-dhcp")
    client.json("router", "create", "gate", "--external-gateway", "sky")
    client.text("router", "add", "subnet", "gate", "near")
    client.json("security", "group", "create", "open")
    core = client.json("image", "create", "core", "--disk-format", "aki", "--container-format", "aki", "--file", client.kernel)
    with tempfile.NamedTemporaryFile() as disk:
        disk.write(bytes(1 << 20))
        disk.flush()
        client.json("image", "create", "small", "--disk-format", "raw", "--container-format", "bare", "--file", disk.name,
            "--property", f"kernel_id={core['id']}")
    server = client.json("server", "create", "box", "--image", "small", "--flavor", "m1.nano", "--network", "near", "--wait")

    def addresses():
        found = client.json("server", "show", "box")["addresses"].get("near", [])
        return len(found)

    same(addresses(), 1)
    client.text("server", "stop", "box")
    client.until("stopped", lambda found: found["status"] == "SHUTOFF", "server", "show", "box")
    client.text("server", "add", "fixed", "ip", "box", "near", "--fixed-ip-address", "10.62.0.77")
    has(client.json("server", "show", "box")["addresses"]["near"], "10.62.0.77")
    client.text("server", "remove", "fixed", "ip", "box", "10.62.0.77", "--os-compute-api-version", "2.43")
    client.until("without it", lambda found: "10.62.0.77" not in found["addresses"]["near"], "server", "show", "box")
    floating = client.json("floating", "ip", "create", "sky")["floating_ip_address"]
    client.text("server", "add", "floating", "ip", "box", floating)
    has(client.json("server", "show", "box")["addresses"]["near"], floating)
    client.text("server", "remove", "floating", "ip", "box", floating)
    same(addresses(), 1)
    client.text("server", "add", "security", "group", "box", "open")
    has(column(client.json("server", "show", "box")["security_groups"], "name"), "open", "default")
    client.text("server", "remove", "security", "group", "box", "open")
    same(column(client.json("server", "show", "box")["security_groups"], "name"), ["default"])
    token = client.json("console", "url", "show", "--serial", "box")["url"].partition("token=")[2]
    same(client.json("console", "connection", "show", token)["instance_uuid"], server["id"])
    client.text("server", "remove", "network", "box", "near")
    client.until("without ports", lambda found: not found["addresses"], "server", "show", "box")
    client.text("server", "delete", "box", "--wait")
    client.text("floating", "ip", "delete", floating)
    client.text("router", "remove", "subnet", "gate", "near")
    client.text("router", "delete", "gate")
    client.text("network", "delete", "near", "sky")
    client.text("security", "group", "delete", "open")
    client.text("image", "delete", "small", "core")
    client.text("project", "cleanup", "--dry-run", "--auth-project")


PARTS = {"servers": servers, "catalog": catalog, "roles": roles, "credentials": credentials, "networks": networks, "groups": groups}
