//! Starts and stops the parts, in the right order.
//!
//! Start: data directory, sockets, store, API server; a node that joins is made a member now; then
//! the API's clients. Stop: first the gateway
//! lets answers end, then the agent stops its runners and says so, then the controllers, the store
//! with its watches, last the API server. Each part has a limit, after which it is dropped.

use std::{io::ErrorKind, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::anyhow;
use axum::{middleware, serve::ListenerExt as _};
use exo_agent::AgentConfig;
use exo_apiserver::{ApiServer, collect_garbage};
use exo_gateway::Gateway;
use exo_store::Store;
use exo_trust::{ClientAuth, ServeLimits, TlsListener, reqwest_client, serve, server_config};
use kube::Client;
use prometheus::Registry;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::{
    access,
    config::{Addresses, Config, Role, StoreChoice, banner},
    control::{self, Start},
    data_dir::DataDir,
    dial::OwnApi,
    join, membership, metrics, open,
    part::{Part, failure_of},
    print_line, reach,
    remote::Servers,
    renew::{Issuer, Renewal, keep_current},
};

/// Answers on their way get this long to end when exo is asked to stop.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);
/// Runners are given three seconds; then the agent reports.
const AGENT_LIMIT: Duration = Duration::from_secs(8);
/// Between two looks whether a store that starts has a leader.
const READY_AGAIN: Duration = Duration::from_millis(200);
/// What is left by then are idle connections.
const SERVER_LIMIT: Duration = Duration::from_millis(500);

/// Runs until a signal comes or a part fails.
pub(crate) async fn run(mut config: Config) -> anyhow::Result<()> {
    let data = DataDir::open(&config.data_dir)?;
    data.settle_names(&mut config)?;
    let signal = CancellationToken::new();
    tokio::spawn(cancel_on_signal(signal.clone()));
    match config.role.clone() {
        Role::ControlPlane { gateway, api, agent, peers, store } => {
            if agent {
                // Before joining, so that a cluster never hears of a node that can do nothing.
                runner_path()?;
            }
            let mut start = control::start(data.standing(), &peers, &data.known_members())?;
            let sockets = Sockets::bind(gateway, api).await?;
            let own = sockets.api.local_addr()?;
            let others = match &mut start {
                Start::Join(peers) => {
                    *peers = reach::others(std::mem::take(peers), own).await?;
                    peers.clone()
                }
                Start::Resume | Start::Found => reach::others(peers, own).await.unwrap_or_default(),
            };
            control::settle_address(&mut config, &others).await?;
            match &start {
                Start::Join(peers) => {
                    let name = (config.node_name.as_str(), config.cluster.as_str());
                    let kind = control::StoreKind::of(&store);
                    control::adopt(&data, peers, name, kind).await?;
                }
                Start::Resume => {
                    control::check_same_cluster(&data.authority_pem()?, &others).await?;
                }
                Start::Found => {}
            }
            let plane =
                Box::pin(ControlPlane::start(&config, &data, sockets, (&start, &store))).await?;
            data.keep_names(&config)?;
            Box::pin(plane.run(&config, &data, (start, agent), signal)).await
        }
        Role::Agent { peers } => {
            control::settle_address(&mut config, &peers).await?;
            run_agent_alone(&config, &data, &peers, signal).await
        }
    }
}

async fn cancel_on_signal(token: CancellationToken) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return error!("signals can't be caught: exo ends only by being killed");
    };
    // Cancel-safe: both only wait for a signal.
    tokio::select! {
        _ = term.recv() => {}
        _ = interrupt.recv() => {}
    }
    info!("stopping");
    token.cancel();
    // A second signal means: now.
    tokio::select! {
        _ = term.recv() => {}
        _ = interrupt.recv() => {}
    }
    std::process::exit(130);
}

/// Both sockets are taken before anything is written, so that a port in use changes nothing.
struct Sockets {
    gateway: TcpListener,
    api: TcpListener,
}

impl Sockets {
    async fn bind(gateway: SocketAddr, api: SocketAddr) -> anyhow::Result<Self> {
        Ok(Self { gateway: bind(gateway, "--port").await?, api: bind(api, "--api-port").await? })
    }
}

/// Listens; `flag` says where.
pub(crate) async fn bind(address: SocketAddr, flag: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| {
        let cure = match error.kind() {
            ErrorKind::AddrNotAvailable => "--listen: this machine has no such address".to_owned(),
            ErrorKind::AddrInUse => format!("choose another {flag}"),
            ErrorKind::PermissionDenied => {
                format!("choose a {flag} of at least 1024, or start exo with more rights")
            }
            _ => format!("choose another {flag} or --listen"),
        };
        anyhow::Error::from(error).context(format!("can't listen on {address}: {cure}"))
    })
}

/// Everything but the agent.
struct ControlPlane {
    store: Store,
    own: OwnApi,
    registry: Registry,
    gateway: Part,
    gateway_address: SocketAddr,
    api_address: SocketAddr,
    join_address: SocketAddr,
    /// Of this node among those that hold the store, where nodes hold it.
    node_id: Option<u64>,
    server: Part,
}

impl ControlPlane {
    /// Opens the store and serves the API.
    async fn start(
        config: &Config,
        data: &DataDir,
        sockets: Sockets,
        (start, choice): (&Start, &StoreChoice),
    ) -> anyhow::Result<Self> {
        let api_address = sockets.api.local_addr()?;
        let gateway_address = sockets.gateway.local_addr()?;
        // Others are told this node's own address, not the one that was bound.
        let join_address = SocketAddr::new(config.address, api_address.port());
        let shared = match choice {
            StoreChoice::Raft => None,
            StoreChoice::Etcd(etcd) => {
                let store = open::etcd(etcd, join_address).await?;
                // Before this node has an authority of its own.
                open::check_authority(&store, data.authority_pem().ok().as_deref()).await?;
                Some(store)
            }
        };
        let authority = data.authority(&config.node_name, config.address)?;
        data.write_kubeconfig(&authority, api_address)?;
        let (store, node_id) = match shared {
            Some(store) => {
                open::claim(&store, authority.certificate_pem()).await?;
                (store, None)
            }
            None => {
                let (store, id) = open::raft(config, data, start, join_address).await?;
                (store, Some(id))
            }
        };
        let registry = Registry::new();
        store.register_metrics(&registry)?;
        let server = ApiServer::new(store.clone(), &exo_crds::all(), &registry)?
            .with_policy(Arc::new(access::allow));
        let router = exo_apiserver::app(server.clone());
        let own = OwnApi::new(router.clone());
        let kind = control::StoreKind::of(choice);
        let nodes = exo_trust::reqwest_client(&data.tls())?;
        let control = control::Host::new(
            (store.clone(), kind),
            &config.cluster,
            &authority,
            (node_id, join_address),
            nodes.clone(),
        );
        let host = join::Host {
            authority,
            store: store.clone(),
            cluster: config.cluster.clone(),
            own_name: config.node_name.clone(),
            client: own.client("exo-join"),
            nodes,
        };
        let app = metrics::route(registry.clone())
            .merge(router)
            .merge(join::routes(host))
            .merge(control::routes(control))
            .layer(middleware::from_fn(metrics::identify));
        let tls = server_config(&data.tls(), ClientAuth::Optional)?;
        let listener = TlsListener::new(sockets.api, tls)?;
        let server = Part::start("API server", |stop| async move {
            let collecting = collect_garbage(server, stop.clone().cancelled_owned());
            let serving = serve(listener, app, ServeLimits::default(), stop.cancelled_owned());
            tokio::join!(serving, collecting);
            Ok(())
        });
        // From now on: as long as the cluster can't be read it tells its clients so.
        let gateway = start_gateway(config, data, &own, sockets.gateway, &registry)?;
        info!("whoever reaches {join_address} may join this cluster");
        Ok(Self {
            store,
            own,
            registry,
            gateway,
            gateway_address,
            api_address,
            join_address,
            node_id,
            server,
        })
    }

    /// Starts the clients of the API, says so, and keeps everything running.
    async fn run(
        self,
        config: &Config,
        data: &DataDir,
        (start, with_agent): (Start, bool),
        signal: CancellationToken,
    ) -> anyhow::Result<()> {
        let Self { store, own, registry, mut gateway, mut server, node_id, .. } = self;
        let (api, join) = (self.api_address, self.join_address);
        let mut members = start_membership(&store, (node_id, join), &own, data)?;
        // Cancel-safe: joining may be repeated, and waiting for a token or for a task loses nothing.
        let entered = tokio::select! {
            () = signal.cancelled() => Ok(false),
            error = members.failure() => Err(error),
            error = gateway.failure() => Err(error),
            entered = enter(&store, (node_id, join), data, &start) => entered.map(|()| true),
        };
        if !matches!(entered, Ok(true)) {
            gateway.stop(SERVER_LIMIT).await;
            store.shutdown().await;
            server.stop(SERVER_LIMIT).await;
            return entered.map(|_| ());
        }
        let mut controllers = start_controllers(own.client("exo-controllers"), &store);
        let mut agent = if with_agent {
            Some(start_agent(config, data, own.client("exo-agent"), &registry)?)
        } else {
            None
        };
        let issuer = Issuer::Here {
            pki: data.pki(),
            address: config.address,
            kubeconfig: data.kubeconfig(),
            api,
        };
        let renewal = start_renewal(config, data, issuer);
        let kubeconfig = data.kubeconfig().display().to_string();
        let addresses = Addresses { gateway: self.gateway_address, api, join };
        print_line(&banner(&addresses, &kubeconfig));
        // Cancel-safe: waiting for a token or for the end of a task loses nothing.
        let failure = tokio::select! {
            () = signal.cancelled() => None,
            error = server.failure() => Some(error),
            error = members.failure() => Some(error),
            error = controllers.failure() => Some(error),
            error = gateway.failure() => Some(error),
            error = failure_of(&mut agent) => Some(error),
        };
        gateway.stop(DRAIN_LIMIT).await;
        if let Some(agent) = agent {
            agent.stop(AGENT_LIMIT).await;
        }
        controllers.stop(SERVER_LIMIT).await;
        members.stop(SERVER_LIMIT).await;
        renewal.stop(SERVER_LIMIT).await;
        // Ends the watches, which would otherwise keep the server's connections open.
        store.shutdown().await;
        server.stop(SERVER_LIMIT).await;
        failure.map_or(Ok(()), Err)
    }
}

/// Makes this node a member of its cluster, and waits until the store answers. `own`: its id there,
/// and the address that others are told.
async fn enter(
    store: &Store,
    own: (Option<u64>, SocketAddr),
    data: &DataDir,
    start: &Start,
) -> anyhow::Result<()> {
    match (start, own) {
        (Start::Join(peers), (Some(id), address)) => {
            let address = address.to_string();
            control::become_member(data, peers, (id, &address)).await?;
        }
        (Start::Join(_), (None, _)) => data.end_joining()?,
        (Start::Found | Start::Resume, _) => {}
    }
    let mut complained = false;
    while let Err(error) = store.current_revision().await {
        if !complained {
            warn!(%error, "waiting for a majority of the control plane's nodes");
        }
        complained = true;
        tokio::time::sleep(READY_AGAIN).await;
    }
    Ok(())
}

fn start_renewal(config: &Config, data: &DataDir, issuer: Issuer) -> Part {
    let renewal = Renewal { tls: data.tls(), node_name: config.node_name.clone(), issuer };
    Part::start("certificate renewal", |stop| async move {
        keep_current(renewal, stop).await;
        Ok(())
    })
}

fn start_controllers(client: Client, store: &Store) -> Part {
    let leads = store.leads();
    Part::start("controllers", |stop| async move {
        Ok(exo_controllers::run(client, leads, stop).await?)
    })
}

fn start_gateway(
    config: &Config,
    data: &DataDir,
    own: &OwnApi,
    socket: TcpListener,
    registry: &Registry,
) -> anyhow::Result<Part> {
    let allowed_origins = config.allowed_origins.clone();
    let limits = exo_gateway::Limits { allowed_origins, ..exo_gateway::Limits::default() };
    let runners = reqwest_client(&data.tls())?;
    let gateway = Gateway::new(own.client("exo-gateway"), runners, registry, limits)?;
    let app = exo_gateway::app(gateway.clone());
    Ok(Part::start("gateway", |stop| async move {
        // Cancel-safe: `run` keeps nothing between its awaits that is not in the index.
        tokio::select! {
            () = gateway.run() => Ok(()),
            () = serve(
                socket.tap_io(set_nodelay),
                app,
                ServeLimits::default(),
                stop.cancelled_owned(),
            ) => Ok(()),
        }
    }))
}

/// Tokens are small writes; Nagle's algorithm would hold them back.
fn set_nodelay(stream: &mut TcpStream) {
    if let Err(error) = stream.set_nodelay(true) {
        debug!(%error, "TCP_NODELAY can't be set");
    }
}

/// Members come, vote and go; ends when this node can't go on as one.
fn start_membership(
    store: &Store,
    (node_id, address): (Option<u64>, SocketAddr),
    own: &OwnApi,
    data: &DataDir,
) -> anyhow::Result<Part> {
    let (store, client, peers) = (store.clone(), own.client("exo"), reqwest_client(&data.tls())?);
    let (raft, path) = (data.raft(), data.path().to_owned());
    Ok(Part::start("store", |stop| async move {
        let gone = async {
            match node_id {
                Some(id) => membership::removed(store.clone(), id, peers).await,
                None => std::future::pending().await,
            }
        };
        // Cancel-safe: each step of each is complete in itself, and is looked at anew after a start.
        tokio::select! {
            () = membership::run(store.clone(), client, stop) => Ok(()),
            () = async { store.keep_voters().await; std::future::pending().await } => Ok(()),
            () = membership::remember(&store, &path, address) => Ok(()),
            why = store.stopped() => Err(anyhow!(why)),
            () = gone => Err(anyhow!(
                "this node was taken out of the cluster. To join it again, remove {} and start \
                 with --peers", raft.display()
            )),
        }
    }))
}

fn runner_path() -> anyhow::Result<PathBuf> {
    let path = std::env::current_exe()?.with_file_name("exo-runner");
    anyhow::ensure!(path.exists(), "{} is missing: install it beside exo", path.display());
    Ok(path)
}

fn start_agent(
    config: &Config,
    data: &DataDir,
    client: Client,
    registry: &Registry,
) -> anyhow::Result<Part> {
    let runner = runner_path()?;
    let config = AgentConfig {
        node_name: config.node_name.clone(),
        data_dir: data.path().to_owned(),
        runner_path: runner,
        model_dirs: config.model_dirs.clone(),
        address: config.address,
        tls: data.tls(),
    };
    for dir in config.model_dirs.iter().filter(|dir| !dir.is_dir()) {
        warn!("EXO_MODEL_PATH: {} is no folder", dir.display());
    }
    let registry = registry.clone();
    Ok(Part::start("agent", |stop| async move {
        Ok(exo_agent::run(config, client, &registry, stop).await?)
    }))
}

/// A node that runs models only.
async fn run_agent_alone(
    config: &Config,
    data: &DataDir,
    peers: &[String],
    signal: CancellationToken,
) -> anyhow::Result<()> {
    // Before joining, so that a cluster never hears of a node that can do nothing.
    runner_path()?;
    control::check_agent(&data.standing())?;
    let peer = if data.has_current_identity(&config.node_name) {
        join::first_member(&data.tls(), peers).await
    } else {
        let name = (config.node_name.as_str(), config.cluster.as_str());
        join::join_first(data, peers, name).await?
    };
    data.keep_names(config)?;
    let registry = Registry::new();
    let mut metrics = metrics::serve_alone(config, data, &registry).await?;
    // First the one that answered, then what people said, then what was heard of last time.
    let mut addresses = vec![peer.to_owned()];
    for address in peers.iter().cloned().chain(data.known_members()) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    let servers = Servers::new(&data.tls(), &addresses)?;
    let mut agent = start_agent(config, data, servers.client(), &registry)?;
    let issuer = Issuer::Peers {
        data: data.path().to_owned(),
        peers: addresses,
        cluster: config.cluster.clone(),
    };
    let renewal = start_renewal(config, data, issuer);
    print_line(&format!("exo runs models for the cluster at {peer}"));
    // Cancel-safe: as above.
    let failure = tokio::select! {
        () = signal.cancelled() => None,
        error = agent.failure() => Some(error),
        error = metrics.failure() => Some(error),
        () = servers.learn(data, signal.clone()) => None,
    };
    agent.stop(AGENT_LIMIT).await;
    renewal.stop(SERVER_LIMIT).await;
    metrics.stop(SERVER_LIMIT).await;
    failure.map_or(Ok(()), Err)
}
