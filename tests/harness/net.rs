//! Hosts as network namespaces on one bridge, whose ways to each other can be cut. Needs root.

use std::process::Command;

use anyhow::{bail, ensure};

/// Namespaces with one address each; gone when dropped.
pub struct Net {
    tag: String,
    subnet: String,
    hosts: usize,
}

fn ip(args: &str) -> anyhow::Result<()> {
    let output = Command::new("ip").args(args.split(' ')).output()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "ip {args}: {text}");
    Ok(())
}

impl Net {
    /// `None` where namespaces can't be made; the reason is printed.
    pub fn start(hosts: usize) -> anyhow::Result<Option<Self>> {
        let pid = std::process::id();
        let net = Self {
            // Interface names have 15 characters at most.
            tag: format!("exo{pid}"),
            subnet: format!("10.{}.{}", 200 + pid % 50, pid / 50 % 250),
            hosts,
        };
        match net.make() {
            Ok(()) => Ok(Some(net)),
            Err(error) if std::env::var_os("CI").is_some() => {
                bail!("no network for tests: {error}")
            }
            Err(error) => {
                eprintln!("namespaces can't be made here ({error:#}): this test did not run");
                Ok(None)
            }
        }
    }

    fn make(&self) -> anyhow::Result<()> {
        let Self { tag, subnet, hosts } = self;
        ip(&format!("link add {tag}b type bridge"))?;
        ip(&format!("addr add {subnet}.1/24 dev {tag}b"))?;
        ip(&format!("link set {tag}b up"))?;
        for host in 0..*hosts {
            let (space, address) = (self.space(host), self.address(host));
            ip(&format!("netns add {space}"))?;
            ip(&format!("link add {tag}v{host} type veth peer name eth0 netns {space}"))?;
            ip(&format!("link set {tag}v{host} master {tag}b up"))?;
            ip(&format!("-n {space} addr add {address}/24 dev eth0"))?;
            ip(&format!("-n {space} link set lo up"))?;
            ip(&format!("-n {space} link set eth0 up"))?;
        }
        Ok(())
    }

    pub fn space(&self, host: usize) -> String {
        format!("{}n{host}", self.tag)
    }

    pub fn address(&self, host: usize) -> String {
        format!("{}.{}", self.subnet, 10 + host)
    }

    /// Drops all packets between one host and the others, in both directions. This process still
    /// reaches all of them.
    pub fn isolate(&self, host: usize) -> anyhow::Result<()> {
        self.routes(host, "replace")
    }

    pub fn rejoin(&self, host: usize) -> anyhow::Result<()> {
        self.routes(host, "del")
    }

    fn routes(&self, host: usize, change: &str) -> anyhow::Result<()> {
        for other in (0..self.hosts).filter(|other| *other != host) {
            for (from, to) in [(host, other), (other, host)] {
                let (space, to) = (self.space(from), self.address(to));
                ip(&format!("-n {space} route {change} blackhole {to}/32"))?;
            }
        }
        Ok(())
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        // What was not made can't be removed; nothing depends on it.
        for host in 0..self.hosts {
            let _ = ip(&format!("netns del {}", self.space(host)));
            let _ = ip(&format!("link del {}v{host}", self.tag));
        }
        let _ = ip(&format!("link del {}b", self.tag));
    }
}
