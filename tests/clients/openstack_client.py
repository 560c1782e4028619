"""Runs commands of the unmodified `openstack` client in this process and checks what they say; see openstack_commands.py."""

import contextlib
import io
import json
import os
import struct
import sys
import tempfile
import time
import traceback
from importlib.metadata import entry_points

from openstackclient import shell
from openstackclient.common import clientmanager
from osc_lib.clientmanager import ClientCache

DEADLINE_S = 60
PAUSE_S = 0.2


sleep = time.sleep
# With --wait the client asks every five seconds, which made four fifths of this script's time; nothing else of it is changed.
time.sleep = lambda seconds: sleep(min(seconds, PAUSE_S))


class Terminal(io.StringIO):
    """Standard input without anything to read: a client that finds a pipe there takes it for an image."""

    def isatty(self):
        return True


def forget_clients():
    """The client keeps its services' clients, with their tokens, for the life of the process."""
    for owner in type.mro(clientmanager.ClientManager):
        for value in vars(owner).values():
            if isinstance(value, ClientCache):
                value._handle = None


class Failed(Exception):
    """A command did something else than it should."""


class Client:
    """Runs commands, counts them, and keeps what went wrong."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.commands = 0
        self.succeeded = set()
        self.seconds = 0.0
        self.failures = []

    def raw(self, *arguments, env=None):
        """Exit code and output of one command."""
        self.commands += 1
        out, err = io.StringIO(), io.StringIO()
        before = dict(os.environ)
        os.environ.update(env or {})
        forget_clients()
        sys.stdin = Terminal()
        started = time.monotonic()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    code = shell.main([str(argument) for argument in arguments])
                except SystemExit as end:
                    code = end.code if isinstance(end.code, int) else 1
        finally:
            os.environ.clear()
            os.environ.update(before)
        took = time.monotonic() - started
        self.seconds += took
        if not code:
            self.succeeded.add(tuple(map(str, arguments)))
        end = "ok  " if not code else f"rc {code}"
        print(f"{end} {took:5.2f} s openstack {' '.join(map(str, arguments))}", flush=True)
        return code or 0, out.getvalue(), err.getvalue()

    def text(self, *arguments, env=None):
        code, out, err = self.raw(*arguments, env=env)
        if code:
            raise Failed(f"{arguments}: exit code {code}: {err or out}")
        return out

    def json(self, *arguments, env=None):
        out = self.text(*arguments, "-f", "json", env=env)
        # With --wait some commands say that they are done before they say what came of it.
        start = min((at for at in (out.find("{"), out.find("[")) if at >= 0), default=0)
        try:
            return json.loads(out[start:])
        except ValueError:
            raise Failed(f"{arguments}: not JSON: {out}") from None

    def fails(self, part, *arguments, env=None):
        """A command that must fail, with `part` in what it says."""
        code, out, err = self.raw(*arguments, env=env)
        if not code:
            raise Failed(f"{arguments}: should have failed: {out}")
        if part not in err + out:
            raise Failed(f"{arguments}: {part!r} is not in: {err}{out}")

    def until(self, what, check, *arguments):
        """Repeats a command until its JSON is as it should be."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            found = self.json(*arguments)
            if check(found):
                return found
            if time.monotonic() > deadline:
                raise Failed(f"{arguments}: never {what}: {found}")
            time.sleep(PAUSE_S)

    def part(self, name, steps):
        print(f"== {name}", flush=True)
        try:
            steps(self)
        except Exception as error:  # the next part is independent of this one
            traceback.print_exc()
            self.failures.append(f"{name}: {error}")


def same(found, wanted, what=""):
    if found != wanted:
        raise Failed(f"{what}: {found!r} is not {wanted!r}")


def has(names, *wanted):
    missing = [name for name in wanted if name not in names]
    if missing:
        raise Failed(f"{missing} not in {names}")


def column(rows, name):
    return [row[name] for row in rows]


def of_client():
    """The client's own commands for these services, each as its words."""
    services = ("common", "identity.v3", "image.v2", "compute.v2", "network.v2")
    return {tuple(entry.name.replace("_", " ").split())
        for service in services for entry in entry_points(group=f"openstack.{service}")}


def complete(client):
    """Every command of the client was run with success, or is named as absent with its reason."""
    commands = of_client()
    longest = max(map(len, commands))
    ran = set()
    for words in client.succeeded:
        known = [words[:length] for length in range(longest, 0, -1) if words[:length] in commands]
        ran.update(known[:1])
    wrong = []
    absent = set()
    with open(os.path.join(os.path.dirname(__file__), "openstack_absent.txt"), encoding="utf-8") as lines:
        for line in filter(None, (line.partition("#")[0].strip() for line in lines)):
            words = tuple(line.split())
            named = {command for command in commands if command[:len(words)] == words}
            wrong += [f"{line} is no command of the client"] if not named else []
            wrong += [f"{' '.join(command)} is there, though openstack_absent.txt names it" for command in named & ran]
            absent |= named
    wrong += sorted(f"{' '.join(command)} was never run with success" for command in commands - ran - absent)
    if wrong:
        raise Failed("\n  ".join(wrong))
    print(f"{len(ran)} of the client's {len(commands)} commands for these services, {len(absent)} are absent")
