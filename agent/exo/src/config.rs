//! From the command line to a checked configuration.

use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    path::PathBuf,
};

use anyhow::{Context as _, bail};
use clap::{Parser, Subcommand, ValueEnum};

/// Gateway: OpenAI clients expect 8080 here.
const DEFAULT_PORT: u16 = 8080;
/// Kubernetes-style API; also the port that other nodes reach.
const DEFAULT_API_PORT: u16 = 8443;
/// Where etcd serves its clients.
const ETCD_PORT: u16 = 2379;
const DEFAULT_CLUSTER: &str = "exo";
/// Longest node name: one DNS label.
const MAX_NAME: usize = 63;

/// The command line as typed.
#[derive(Debug, Parser)]
#[command(
    name = "exo",
    version,
    about = "Run one model on all your machines. `exo` starts a cluster; a further machine joins \
             it with `exo --peers HOST:8443`.",
    args_conflicts_with_subcommands = true
)]
pub(crate) struct RawArgs {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    /// Port of the OpenAI API (plain HTTP)
    #[arg(long, default_value_t = DEFAULT_PORT)]
    port: u16,
    /// Name of this node [default: the one that it had, else the host name]
    #[arg(long, value_name = "NODE")]
    name: Option<String>,
    /// Name of the cluster; nodes join only their own [default: exo]
    #[arg(long, value_name = "NAME")]
    cluster: Option<String>,
    /// Where state is kept [default: ~/.exo]
    #[arg(long, value_name = "DIR", env = "EXO_HOME")]
    data_dir: Option<PathBuf>,
    /// Address to listen on [default: all]
    #[arg(long, value_name = "IP")]
    listen: Option<IpAddr>,
    /// Port of the Kubernetes-style API (TLS with client certificates)
    #[arg(long, default_value_t = DEFAULT_API_PORT)]
    api_port: u16,
    /// API addresses of a cluster's nodes: join it by the first one that lets this node in
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',')]
    peers: Vec<String>,
    /// Serve the cluster, run no models on this machine
    #[arg(long)]
    no_agent: bool,
    /// Run models only; the control plane is on the nodes named by --peers
    #[arg(long)]
    no_control_plane: bool,
    /// Websites whose pages may use the OpenAI API, besides those of this machine; * for all
    #[arg(long, value_name = "ORIGIN", value_delimiter = ',')]
    allow_origin: Vec<String>,
    /// Where the cluster's state is kept [default: on the nodes themselves]
    #[arg(long, value_name = "etcd://HOST:PORT,…")]
    store: Option<String>,
    /// User of etcd; the password is taken from EXO_ETCD_PASSWORD
    #[arg(long, value_name = "NAME", requires = "store")]
    etcd_user: Option<String>,
    /// Certificate of etcd's authority (PEM): calls etcd by TLS
    #[arg(long, value_name = "FILE", requires = "store")]
    etcd_ca: Option<PathBuf>,
    /// Certificate to show to etcd (PEM)
    #[arg(long, value_name = "FILE", requires_all = ["etcd_ca", "etcd_key"])]
    etcd_cert: Option<PathBuf>,
    /// Its key (PEM)
    #[arg(long, value_name = "FILE", requires = "etcd_cert")]
    etcd_key: Option<PathBuf>,
    /// Form of the log on stderr; what is logged is set by EXO_LOG
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Print the version
    Version,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

/// What to run, checked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Config {
    pub(crate) node_name: String,
    pub(crate) cluster: String,
    /// Whether these two were asked for by name.
    pub(crate) named: Named,
    pub(crate) data_dir: PathBuf,
    /// Address that other nodes are told.
    pub(crate) address: IpAddr,
    /// It is loopback only because the first peer was named so: the peer knows better, see
    /// `control::settle_address`.
    pub(crate) is_loopback_by_peer: bool,
    /// Where a node without a control plane serves its metrics.
    pub(crate) metrics: SocketAddr,
    pub(crate) role: Role,
    /// Folders that hold models, from `EXO_MODEL_PATH`.
    pub(crate) model_dirs: Vec<PathBuf>,
    /// Origins whose web pages may use the gateway.
    pub(crate) allowed_origins: Vec<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Named {
    pub(crate) node: bool,
    pub(crate) cluster: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Role {
    /// Control plane, and an agent unless told otherwise. Without peers it founds its cluster, if
    /// its data directory knows none.
    ControlPlane {
        gateway: SocketAddr,
        api: SocketAddr,
        agent: bool,
        peers: Vec<String>,
        store: StoreChoice,
    },
    /// Agent alone, in the cluster of the first peer that answers.
    Agent { peers: Vec<String> },
}

/// Where the cluster's state is kept.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum StoreChoice {
    Raft,
    Etcd(Box<Etcd>),
}

/// An etcd cluster and how to be let in.
#[derive(Clone, PartialEq)]
pub(crate) struct Etcd {
    /// `http://host:port` or `https://…`, each.
    pub(crate) endpoints: Vec<String>,
    /// Name and password.
    pub(crate) user: Option<(String, String)>,
    /// PEM files.
    pub(crate) ca: Option<PathBuf>,
    /// Certificate and key, PEM files.
    pub(crate) identity: Option<(PathBuf, PathBuf)>,
}

impl std::fmt::Debug for Etcd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The password is nobody's business.
        f.debug_struct("Etcd").field("endpoints", &self.endpoints).finish_non_exhaustive()
    }
}

/// What the process finds around it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Surroundings {
    pub(crate) home: Option<PathBuf>,
    pub(crate) host_name: Option<String>,
    pub(crate) model_path: Option<std::ffi::OsString>,
    pub(crate) etcd_password: Option<String>,
}

impl Surroundings {
    pub(crate) fn observe() -> Self {
        Self {
            home: std::env::home_dir(),
            host_name: hostname::get().ok().and_then(|name| name.into_string().ok()),
            model_path: std::env::var_os("EXO_MODEL_PATH"),
            etcd_password: std::env::var("EXO_ETCD_PASSWORD").ok(),
        }
    }
}

impl RawArgs {
    pub(crate) fn log_format(&self) -> LogFormat {
        self.log_format
    }

    pub(crate) fn check(self, around: &Surroundings) -> anyhow::Result<Config> {
        let store = self.store_choice(around)?;
        let data_dir = match (self.data_dir, &around.home) {
            (Some(dir), _) => dir,
            (None, Some(home)) => home.join(".exo"),
            (None, None) => bail!("no home directory is known: add --data-dir DIR"),
        };
        let data_dir = std::path::absolute(data_dir).context("--data-dir")?;
        let node_name = match (&self.name, &around.host_name) {
            (Some(name), _) => checked_name(name).context("--name")?,
            (None, Some(host)) => {
                name_from_host(host).context("the host name gives no node name: add --name NODE")?
            }
            (None, None) => bail!("this machine has no host name: add --name NODE"),
        };
        let cluster = self.cluster.as_deref().unwrap_or(DEFAULT_CLUSTER);
        let cluster = checked_name(cluster).context("--cluster")?;
        let named = Named { node: self.name.is_some(), cluster: self.cluster.is_some() };
        for peer in &self.peers {
            checked_peer(peer, DEFAULT_API_PORT).context("--peers")?;
        }
        let any = self.listen.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let role = match (self.no_control_plane, self.no_agent) {
            (true, true) => bail!("--no-agent and --no-control-plane leave nothing to run"),
            (true, false) if self.peers.is_empty() => {
                bail!("--no-control-plane needs a cluster to join: add --peers HOST:PORT")
            }
            (true, false) if store != StoreChoice::Raft => {
                bail!("--store is for nodes with a control plane: leave out --no-control-plane")
            }
            (true, false) => Role::Agent { peers: self.peers.clone() },
            (false, no_agent) => Role::ControlPlane {
                gateway: SocketAddr::new(any, self.port),
                api: SocketAddr::new(any, self.api_port),
                agent: !no_agent,
                peers: self.peers.clone(),
                store,
            },
        };
        let (address, is_loopback_by_peer) = match (self.listen, self.peers.first()) {
            (Some(ip), _) if !ip.is_unspecified() => (ip, false),
            (_, None) => (own_address(None), false),
            (_, Some(peer)) => {
                let address = own_address(Some(peer));
                (address, address.is_loopback())
            }
        };
        for origin in &self.allow_origin {
            checked_origin(origin)?;
        }
        let model_dirs = around.model_path.as_deref().map(std::env::split_paths);
        Ok(Config {
            node_name,
            cluster,
            named,
            data_dir,
            address,
            is_loopback_by_peer,
            metrics: SocketAddr::new(any, self.api_port),
            role,
            model_dirs: model_dirs.into_iter().flatten().filter(|p| p.is_absolute()).collect(),
            allowed_origins: self.allow_origin,
        })
    }
}

impl RawArgs {
    fn store_choice(&self, around: &Surroundings) -> anyhow::Result<StoreChoice> {
        let Some(text) = self.store.as_deref() else {
            return Ok(StoreChoice::Raft);
        };
        let Some(hosts) = text.strip_prefix("etcd://") else {
            bail!("--store: `{text}` is not etcd://HOST:PORT[,HOST:PORT…]");
        };
        if hosts.is_empty() {
            bail!("--store: `{text}` names no server: write etcd://HOST:PORT[,HOST:PORT…]");
        }
        if !cfg!(feature = "etcd") {
            bail!(
                "--store: this exo was built without etcd. Build it with `make build`, or with \
                 `cargo build -p exo --features etcd`, which needs protoc"
            );
        }
        let scheme = if self.etcd_ca.is_some() { "https" } else { "http" };
        let endpoints = hosts
            .split(',')
            .map(|host| checked_peer(host, ETCD_PORT).map(|()| format!("{scheme}://{host}")))
            .collect::<anyhow::Result<_>>()
            .context("--store")?;
        let user = match (&self.etcd_user, &around.etcd_password) {
            (Some(name), Some(password)) => Some((name.clone(), password.clone())),
            (Some(_), None) => bail!("--etcd-user needs a password: set EXO_ETCD_PASSWORD"),
            (None, _) => None,
        };
        let identity = self.etcd_cert.clone().zip(self.etcd_key.clone());
        let etcd = Etcd { endpoints, user, ca: self.etcd_ca.clone(), identity };
        Ok(StoreChoice::Etcd(Box::new(etcd)))
    }
}

/// `HOST:PORT`; `usual` is the port that is suggested where there is none.
fn checked_peer(peer: &str, usual: u16) -> anyhow::Result<()> {
    let is_host = |host: &str| {
        let inner = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        let is_v6 = inner.is_some_and(|inner| inner.parse::<Ipv6Addr>().is_ok());
        is_v6 || (!host.is_empty() && !host.contains(|c: char| "/:@?#[]".contains(c) || c == ' '))
    };
    let is_port = |port: &str| port.parse::<u16>().is_ok_and(|port| port > 0);
    if peer.rsplit_once(':').is_some_and(|(host, port)| is_host(host) && is_port(port)) {
        return Ok(());
    }
    // Most who write something else mean this.
    let bare = peer.split_once("://").map_or(peer, |(_, rest)| rest);
    let bare = bare.split('/').next().unwrap_or_default();
    let meant = match bare.rsplit_once(':') {
        _ if bare.parse::<Ipv6Addr>().is_ok() => format!("[{bare}]:{usual}"),
        Some((host, port)) if is_host(host) && is_port(port) => bare.to_owned(),
        _ if is_host(bare) => format!("{bare}:{usual}"),
        _ => bail!("`{peer}` is not HOST:PORT"),
    };
    bail!("`{peer}` is not HOST:PORT: write {meant}")
}

/// `SCHEME://HOST[:PORT]` as browsers send it, or `*`. Anything else would never match.
fn checked_origin(origin: &str) -> anyhow::Result<()> {
    let well_formed = origin.split_once("://").is_some_and(|(scheme, host)| {
        !scheme.is_empty() && !host.is_empty() && !host.contains('/')
    });
    if origin != "*" && !well_formed {
        bail!(
            "--allow-origin: `{origin}` is not an origin such as https://chat.example.org \
             (no path, no / at the end)"
        );
    }
    Ok(())
}

/// A DNS label (RFC 1123), as Kubernetes demands of names.
pub(crate) fn checked_name(name: &str) -> anyhow::Result<String> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if name.is_empty()
        || name.len() > MAX_NAME
        || !name.chars().all(allowed)
        || name.starts_with('-')
        || name.ends_with('-')
    {
        bail!(
            "`{name}` is not a name: use at most {MAX_NAME} lower-case letters, digits and `-`, \
             with a letter or digit first and last"
        );
    }
    Ok(name.to_owned())
}

/// `Annas-Mac-Studio.local` → `annas-mac-studio`.
fn name_from_host(host: &str) -> Option<String> {
    let first = host.split('.').next().unwrap_or_default().to_ascii_lowercase();
    let kept: String =
        first.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let name: String = kept.trim_matches('-').chars().take(MAX_NAME).collect();
    checked_name(name.trim_end_matches('-')).ok()
}

/// The address from which this machine would reach `peer`, or the network at large. Connecting a
/// UDP socket sends nothing; it only asks the routing table.
pub(crate) fn own_address(peer: Option<&str>) -> IpAddr {
    // Any address outside the LAN does; this one is set aside for documentation (RFC 5737).
    let target = peer.unwrap_or("192.0.2.1:9");
    let ask = || -> std::io::Result<IpAddr> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect(target)?;
        Ok(socket.local_addr()?.ip())
    };
    // Without a default route (machines on a bare switch or cable) any own address is better than
    // loopback, which only this machine can reach.
    ask().ok().or_else(interface_address).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
}

/// The IPv4 address of an interface: a routable one, else a link-local one.
fn interface_address() -> Option<IpAddr> {
    let networks = sysinfo::Networks::new_with_refreshed_list().ok()?;
    let mut found: Vec<Ipv4Addr> = networks
        .values()
        .flat_map(|interface| interface.ip_networks())
        .filter_map(|network| match network.addr {
            IpAddr::V4(ip) if !ip.is_loopback() && !ip.is_unspecified() => Some(ip),
            IpAddr::V4(_) | IpAddr::V6(_) => None,
        })
        .collect();
    found.sort_by_key(|ip| (ip.is_link_local(), *ip));
    found.first().copied().map(IpAddr::V4)
}

/// Where this node answers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Addresses {
    /// As bound.
    pub(crate) gateway: SocketAddr,
    /// As bound.
    pub(crate) api: SocketAddr,
    /// The API as other nodes reach it.
    pub(crate) join: SocketAddr,
}

/// What a person who started `exo` reads.
pub(crate) fn banner(addresses: &Addresses, kubeconfig: &str) -> String {
    let Addresses { gateway, api, join } = *addresses;
    let host = |address: SocketAddr| match address.ip() {
        ip if ip.is_unspecified() => format!("localhost:{}", address.port()),
        _ => address.to_string(),
    };
    let mut text = String::new();
    // Writing to a String can't fail.
    let _ = writeln!(text, "exo is ready");
    let _ = writeln!(text, "  OpenAI API   http://{}/v1", host(gateway));
    let _ = writeln!(text, "  cluster API  https://{}   KUBECONFIG={kubeconfig}", host(api));
    let reach = if join.ip().is_loopback() { "   (on this machine only)" } else { "" };
    let _ = writeln!(text, "  join         exo --peers {join}{reach}");
    text
}

#[cfg(test)]
impl Config {
    /// An agent in `data_dir`.
    pub(crate) fn for_tests(data_dir: &std::path::Path) -> Self {
        let ip = IpAddr::V4(Ipv4Addr::LOCALHOST);
        Self {
            node_name: "a".to_owned(),
            cluster: DEFAULT_CLUSTER.to_owned(),
            named: Named::default(),
            data_dir: data_dir.to_owned(),
            address: ip,
            is_loopback_by_peer: false,
            metrics: SocketAddr::new(ip, 0),
            role: Role::Agent { peers: Vec::new() },
            model_dirs: Vec::new(),
            allowed_origins: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests;
