//! How a rank is joined to the others before MLX is: the rank channel, and the tasks that listen to it. Owns who hears of
//! what; never runs steps.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
        mpsc,
    },
    time::Duration,
};

use exo_crds::{
    ShardPhase,
    runner::{EXIT_STOPPED, REASON_PEER_LOST},
};
use exo_engine::exit_now;
use tokio::{sync::Mutex, time::timeout};

use super::super::{
    channel::{self, ChannelError, Hello, Peer, RankCommand, RankNote, Receiver, Sender},
    report::{Failure, Reporter, chain},
    roll::{Roll, Steps},
    watchdog::Watchdog,
};
use super::Start;

/// For all ranks to start and find each other; an agent may have a runner to fetch first.
const CONNECT_LIMIT: Duration = Duration::from_secs(60);
const MEET_LIMIT: Duration = Duration::from_secs(60);
/// For the last words to rank 0.
pub(super) const LAST_WORDS_LIMIT: Duration = Duration::from_secs(1);

pub(super) const WAITING: &str = "waiting for the other ranks to load";

/// How a rank gets its orders.
pub(super) enum Link {
    /// Rank 0 makes them from requests.
    First,
    /// The others are told.
    Other {
        commands: mpsc::Receiver<RankCommand>,
        /// Back to rank 0.
        sender: Arc<Mutex<Sender>>,
        /// This rank ends for a cause of its own: what becomes of the channel then is none.
        leaves: Arc<AtomicBool>,
    },
}

/// Counts the ranks that have their weights.
#[derive(Clone)]
pub(super) struct Loaded {
    count: Arc<AtomicU32>,
    world_size: u32,
    watchdog: Watchdog,
}

impl Loaded {
    pub(super) fn one_more(&self) {
        if self.count.fetch_add(1, Ordering::SeqCst) + 1 == self.world_size {
            // Unless the ranks have met already.
            self.watchdog.replace(WAITING, "meeting the other ranks after loading", MEET_LIMIT);
        }
    }
}

/// Opens the rank channel.
pub(super) fn connect(start: &mut Start) -> Result<(Link, Loaded), Failure> {
    let Start { config, tls, runtime, reporter, watchdog, senders, control, steps, .. } = start;
    let loaded =
        Loaded { count: Arc::default(), world_size: config.world_size, watchdog: watchdog.clone() };
    reporter.phase(ShardPhase::Connecting, 0);
    if config.world_size == 1 {
        return Ok((Link::First, loaded));
    }
    let me = Hello::from(&*config);
    let Some(listener) = control.take() else {
        let connecting = channel::connect(config.control, tls, &me, CONNECT_LIMIT);
        let (sender, receiver) =
            runtime.block_on(connecting).map_err(|error| channel_failure(&error))?.split();
        let (orders, commands) = mpsc::channel();
        let sender = Arc::new(Mutex::new(sender));
        let leaves = Arc::new(AtomicBool::new(false));
        let (back, ends) = ((sender.clone(), steps.clone()), (reporter.clone(), leaves.clone()));
        runtime.spawn(take_commands(receiver, orders, back, ends));
        return Ok((Link::Other { commands, sender, leaves }, loaded));
    };
    let gathering = channel::gather(&listener, tls, &me, CONNECT_LIMIT);
    let peers = runtime.block_on(gathering).map_err(|error| channel_failure(&error))?;
    let roll = Roll::default();
    let asked = (roll.clone(), runtime.clone(), senders.clone(), steps.clone());
    watchdog.ask(Box::new(move |still| {
        let (roll, runtime, senders, steps) = &asked;
        roll.call(runtime, senders, steps, still)
    }));
    let mut ends = senders.blocking_lock();
    for peer in peers {
        let (sender, receiver) = Peer::split(peer);
        ends.push(sender);
        let all = senders.clone();
        let told = (loaded.clone(), roll.clone());
        runtime.spawn(take_notes(receiver, told, reporter.clone(), all));
    }
    drop(ends);
    Ok((Link::First, loaded))
}

/// Other ranks: hands commands to the engine's thread until rank 0 is lost.
async fn take_commands(
    mut receiver: Receiver,
    orders: mpsc::Sender<RankCommand>,
    (sender, steps): (Arc<Mutex<Sender>>, Steps),
    (reporter, leaves): (Reporter, Arc<AtomicBool>),
) {
    loop {
        let received = receiver.receive().await;
        if leaves.load(Ordering::SeqCst) {
            return;
        }
        match received {
            Ok(RankCommand::RollCall) => {
                let here = RankNote::Here { steps: steps.count() };
                // Without a connection the next receive tells.
                let _ = sender.lock().await.send(&here).await;
            }
            Ok(RankCommand::Shutdown) => exit_now(EXIT_STOPPED),
            Ok(RankCommand::Abandon { message }) => {
                reporter.fail(&Failure::retryable(REASON_PEER_LOST, message));
            }
            // The engine's thread is gone only when it ends the process itself.
            Ok(command) => drop(orders.send(command)),
            Err(error) => reporter.fail(&channel_failure(&error)),
        }
    }
}

/// Rank 0: listens to one rank until it is lost.
async fn take_notes(
    mut receiver: Receiver,
    (loaded, roll): (Loaded, Roll),
    reporter: Reporter,
    senders: Arc<Mutex<Vec<Sender>>>,
) {
    let rank = receiver.rank();
    let failure = loop {
        match receiver.receive().await {
            Ok(RankNote::Loaded) => loaded.one_more(),
            Ok(RankNote::Here { steps }) => roll.answered(rank, steps),
            Ok(RankNote::Failed { message }) => {
                let message = format!("rank {rank} failed: {message}");
                break Failure::retryable(REASON_PEER_LOST, message);
            }
            Err(error) => break channel_failure(&error),
        }
    };
    // The others would see the loss of rank 0 only.
    let message = failure.message.clone();
    let tell = async {
        let mut senders = senders.lock().await;
        senders.retain(|sender| sender.rank() != rank);
        channel::send_all(&mut senders, &RankCommand::Abandon { message }).await
    };
    let _ = timeout(LAST_WORDS_LIMIT, tell).await;
    reporter.fail(&failure)
}

pub(crate) fn channel_failure(error: &ChannelError) -> Failure {
    let (reason, permanent) = match error {
        ChannelError::Trust(_) => ("BadCertificates", true),
        ChannelError::Listen { .. } => ("PortInUse", false),
        ChannelError::Missing { .. } | ChannelError::Unreachable { .. } => ("PeerMissing", false),
        ChannelError::Lost { .. } => (REASON_PEER_LOST, false),
    };
    Failure { reason, message: chain(error), permanent }
}
