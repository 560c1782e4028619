//! Where servers run: on this machine, or in the lab.

use std::process::Command;

use anyhow::{Context as _, bail};

use crate::programs::source_dir;

/// A host on which shell commands can be run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// This machine.
    Here,
    /// The lab of this name.
    Lab(String),
}

impl Place {
    /// Runs a shell script there and gives its output; a failure carries both output and error text.
    pub fn sh(&self, script: &str) -> anyhow::Result<String> {
        let mut command = match self {
            Self::Here => Command::new("sh"),
            Self::Lab(name) => {
                let mut command = Command::new(source_dir().join("tests/lab/lab"));
                command.args(["exec", "--name", name, "--", "sh"]);
                command
            }
        };
        let output = command.arg("-c").arg(script).output().context("starting a shell")?;
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if !output.status.success() {
            bail!("{} from: {script}\n{out}{err}", output.status);
        }
        Ok(out.into_owned())
    }

    /// The network namespace of a network on this host, if it has one. Its name ends in the first 11 hex digits of the
    /// network's id.
    pub fn namespace_of(&self, network_id: &str) -> anyhow::Result<Option<String>> {
        let short = short_id(network_id);
        let names = self.sh("ip netns list")?;
        let mut found =
            names.lines().filter_map(|l| l.split_whitespace().next()).filter(|n| n.ends_with(&short));
        Ok(found.next().map(str::to_owned))
    }

    /// What a server and its network left on this host: one line each, empty when nothing is left.
    pub fn leftovers(
        &self,
        dirs: &[String],
        server_id: &str,
        network_id: Option<&str>,
    ) -> anyhow::Result<String> {
        let network = network_id.map_or_else(|| "no-network".into(), short_id);
        // A process of the server's has its id as a whole argument. The pattern is written so that grep doesn't find itself.
        // Few processes: in the lab each costs a tenth of a second.
        let script = format!(
            r#"grep -alzx -e '{pattern}' /proc/[0-9]*/cmdline 2>/dev/null | sed 's/^/process /'
ip netns list | grep -e '{network}' | sed 's/^/namespace /'
ip -o link | grep -e 'mote\|tap' | sed 's/^/link /'
find {dirs} -path '*{server_id}*' 2>/dev/null | sed 's/^/file /'
true"#,
            pattern = format_args!("[{}]{}", &server_id[..1], &server_id[1..]),
            dirs = dirs.join(" "),
        );
        self.sh(&script)
    }
}

/// The first 11 hex digits of an id, as used in names of interfaces and namespaces.
pub fn short_id(id: &str) -> String {
    id.chars().filter(|c| *c != '-').take(11).collect()
}
