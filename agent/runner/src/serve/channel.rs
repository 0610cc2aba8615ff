//! The rank channel: rank 0 tells the other ranks what to run, they tell it how they fare. TCP with
//! mutual TLS, one JSON object per line. Its end means that a rank is lost; this module only says
//! so, and never decides what that means.
//!
//! A rank connects, says [`Hello`] and gets an [`Answer`] once all ranks are there.

use std::{collections::BTreeMap, io, net::SocketAddr, sync::Arc, time::Duration};

use exo_crds::runner::RunnerConfig;
use exo_engine::{Feed, Opening, SeqId, Step};
use exo_trust::{ClientAuth, NODE_DNS_NAME, TlsPaths, TrustError};
use futures::StreamExt as _;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncWriteExt as _, ReadHalf, WriteHalf},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};
use tokio_util::codec::{FramedRead, LinesCodec, LinesCodecError};
use tracing::{debug, info, warn};

/// A step carries a chunk of a prompt; a line of many times its size is an error.
const LINE_BYTES_MAX: usize = 1 << 20;
/// A peer that takes longer over handshake and hello is cut off; the others don't wait for it.
const HELLO_LIMIT: Duration = Duration::from_secs(5);
/// Between two tries to reach rank 0, which may not listen yet.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// The number of what ranks say to each other and do in a step. Goes up with every change after which ranks of both
/// sides could not run a model together.
const PROTOCOL: u32 = 1;

/// What all ranks run, in this order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum RankCommand {
    Open {
        seq: SeqId,
        opening: Opening,
    },
    Prefill(Step),
    Decode(Vec<Feed>),
    /// The rows of the last decode step once more, each fed what it drew. Nothing if that step was refused.
    DecodeAgain,
    Close {
        seq: SeqId,
    },
    /// All ranks are warm: requests may come.
    Ready,
    /// Rank 0 was asked to stop: so are the others.
    Shutdown,
    /// Say how far you are.
    RollCall,
    /// Another rank is lost, and the group with it.
    Abandon {
        message: String,
    },
}

/// What another rank tells rank 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum RankNote {
    /// Its weights are read.
    Loaded,
    /// Answers a roll call: so many steps are done.
    Here { steps: u64 },
    /// It ends for this reason.
    Failed { message: String },
}

/// Who a rank is and which group it looks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub(crate) group: String,
    pub(crate) epoch: u64,
    pub(crate) rank: u32,
    pub(crate) world_size: u32,
    /// [`PROTOCOL`] of the rank; there was a time without.
    #[serde(default)]
    protocol: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Answer {
    Welcome,
    Refused { reason: String },
}

/// What went wrong with the rank channel.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChannelError {
    #[error("setting up TLS for the rank channel")]
    Trust(#[from] TrustError),
    #[error("listening at {address}")]
    Listen {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    /// With the last reason why a rank was turned away, in parentheses, if one was.
    #[error("{missing} did not connect within {seconds} s{turned_away}")]
    Missing { missing: String, seconds: u64, turned_away: String },
    #[error("rank 0 at {address} could not be reached within {seconds} s (last: {last})")]
    Unreachable { address: SocketAddr, seconds: u64, last: String },
    #[error("lost rank {rank}: {reason}")]
    Lost { rank: u32, reason: String },
}

impl From<&RunnerConfig> for Hello {
    fn from(config: &RunnerConfig) -> Self {
        Self {
            group: config.group.clone(),
            epoch: config.epoch,
            rank: config.rank,
            world_size: config.world_size,
            protocol: PROTOCOL,
        }
    }
}

impl Hello {
    /// What rank 0, who is `self`, has against the rank that says `other`.
    fn objection(&self, other: &Self) -> Option<String> {
        if other.group != self.group {
            Some(format!("group is {}, not {}", self.group, other.group))
        } else if other.epoch != self.epoch {
            Some(format!("epoch is {}, not {}", self.epoch, other.epoch))
        } else if other.world_size != self.world_size {
            Some(format!("world size is {}, not {}", self.world_size, other.world_size))
        } else if other.rank == 0 || other.rank >= self.world_size {
            Some(format!("there is no rank {} to be had", other.rank))
        } else if other.protocol != self.protocol {
            Some(format!(
                "rank {} runs another version of exo than rank 0 (protocol {}, not {}): all nodes of a group must \
                 run the same",
                other.rank, other.protocol, self.protocol
            ))
        } else {
            None
        }
    }
}

/// The connection to one rank, before it is taken apart.
#[derive(Debug)]
pub(crate) struct Peer {
    rank: u32,
    lines: FramedRead<ReadHalf<TlsStream<TcpStream>>, LinesCodec>,
    writer: WriteHalf<TlsStream<TcpStream>>,
}

impl Peer {
    fn new(rank: u32, stream: impl Into<TlsStream<TcpStream>>) -> Self {
        let (reader, writer) = tokio::io::split(stream.into());
        let codec = LinesCodec::new_with_max_length(LINE_BYTES_MAX);
        Self { rank, lines: FramedRead::new(reader, codec), writer }
    }

    pub(crate) fn split(self) -> (Sender, Receiver) {
        let Self { rank, lines, writer } = self;
        (Sender { rank, writer }, Receiver { rank, lines })
    }

    async fn send(&mut self, message: &impl Serialize) -> io::Result<()> {
        write(&mut self.writer, &encode(message)).await
    }

    async fn receive<T: DeserializeOwned>(&mut self) -> Result<T, String> {
        read(&mut self.lines).await
    }
}

/// The half that talks to one rank.
#[derive(Debug)]
pub(crate) struct Sender {
    rank: u32,
    writer: WriteHalf<TlsStream<TcpStream>>,
}

/// The half that listens to one rank.
#[derive(Debug)]
pub(crate) struct Receiver {
    rank: u32,
    lines: FramedRead<ReadHalf<TlsStream<TcpStream>>, LinesCodec>,
}

impl Sender {
    pub(crate) fn rank(&self) -> u32 {
        self.rank
    }

    pub(crate) async fn send(&mut self, message: &impl Serialize) -> Result<(), ChannelError> {
        send_all(std::slice::from_mut(self), message).await
    }
}

/// Sends one message to several ranks.
pub(crate) async fn send_all(
    senders: &mut [Sender],
    message: &impl Serialize,
) -> Result<(), ChannelError> {
    let line = encode(message);
    for sender in senders {
        write(&mut sender.writer, &line)
            .await
            .map_err(|error| ChannelError::Lost { rank: sender.rank, reason: error.to_string() })?;
    }
    Ok(())
}

impl Receiver {
    pub(crate) fn rank(&self) -> u32 {
        self.rank
    }

    /// Waits for the next message.
    pub(crate) async fn receive<T: DeserializeOwned>(&mut self) -> Result<T, ChannelError> {
        read(&mut self.lines).await.map_err(|reason| ChannelError::Lost { rank: self.rank, reason })
    }
}

/// Rank 0: waits for all other ranks on `listener` until the deadline; returns them in rank order.
/// Connections that can't prove to be of this group are refused and change nothing.
pub(crate) async fn gather(
    listener: &TcpListener,
    tls: &TlsPaths,
    me: &Hello,
    limit: Duration,
) -> Result<Vec<Peer>, ChannelError> {
    let deadline = Instant::now() + limit;
    let acceptor =
        TlsAcceptor::from(Arc::new(exo_trust::server_config(tls, ClientAuth::Required)?));
    let wanted = me.world_size.saturating_sub(1) as usize;
    let mut peers: BTreeMap<u32, Peer> = BTreeMap::new();
    let mut greetings = JoinSet::new();
    let mut turned_away = String::new();
    while peers.len() < wanted {
        // Cancel-safe: accept, join_next and the clock lose nothing when dropped.
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, address)) => {
                    let (acceptor, me) = (acceptor.clone(), me.clone());
                    greetings.spawn(async move {
                        match timeout(HELLO_LIMIT, greet(stream, acceptor, &me)).await {
                            Ok(Ok(greeted)) => return Some(greeted),
                            Ok(Err(error)) => warn!(%address, error, "a connection failed"),
                            Err(_) => warn!(%address, "a connection said no hello in time"),
                        }
                        None
                    });
                }
                Err(error) => {
                    warn!(%error, "accepting a connection failed");
                    sleep(RETRY_PAUSE).await;
                }
            },
            Some(greeted) = greetings.join_next() => match greeted {
                Ok(Some(Greeted::Peer(peer))) => {
                    info!(rank = peer.rank, "a rank connected");
                    // A rank that comes again has given up its first connection.
                    peers.insert(peer.rank, peer);
                }
                Ok(Some(Greeted::TurnedAway(reason))) => {
                    let last = format!(" (turned away: {reason})");
                    // The rank tries again and again.
                    if last != turned_away {
                        warn!(reason, "turned a rank away");
                        turned_away = last;
                    }
                }
                Ok(None) | Err(_) => {}
            },
            () = tokio::time::sleep_until(deadline) => {
                let missing: Vec<String> = (1..me.world_size)
                    .filter(|rank| !peers.contains_key(rank))
                    .map(|rank| rank.to_string())
                    .collect();
                let plural = if missing.len() > 1 { "ranks" } else { "rank" };
                return Err(ChannelError::Missing {
                    missing: format!("{plural} {}", missing.join(", ")),
                    seconds: limit.as_secs(),
                    turned_away,
                });
            }
        }
    }
    for peer in peers.values_mut() {
        peer.send(&Answer::Welcome)
            .await
            .map_err(|error| ChannelError::Lost { rank: peer.rank, reason: error.to_string() })?;
    }
    Ok(peers.into_values().collect())
}

/// What became of a connection that has said a hello.
enum Greeted {
    Peer(Peer),
    TurnedAway(String),
}

/// Lets one rank in, or says why not.
async fn greet(stream: TcpStream, acceptor: TlsAcceptor, me: &Hello) -> Result<Greeted, String> {
    stream.set_nodelay(true).map_err(|error| error.to_string())?;
    let stream = acceptor.accept(stream).await.map_err(|error| error.to_string())?;
    // The rank is not known yet.
    let mut peer = Peer::new(0, stream);
    let hello: Hello = peer.receive().await?;
    if let Some(reason) = me.objection(&hello) {
        let refusal = Answer::Refused { reason: reason.clone() };
        peer.send(&refusal).await.map_err(|error| error.to_string())?;
        // Without it the end of the stream could overtake the reason.
        let _ = peer.writer.shutdown().await;
        return Ok(Greeted::TurnedAway(reason));
    }
    peer.rank = hello.rank;
    Ok(Greeted::Peer(peer))
}

/// Other ranks: connects to rank 0, again and again until the deadline, and waits to be welcomed.
pub(crate) async fn connect(
    address: SocketAddr,
    tls: &TlsPaths,
    me: &Hello,
    limit: Duration,
) -> Result<Peer, ChannelError> {
    let deadline = Instant::now() + limit;
    let connector = TlsConnector::from(Arc::new(exo_trust::client_config(tls)?));
    let mut last = "no try was finished".to_owned();
    let unreachable = |last| ChannelError::Unreachable { address, seconds: limit.as_secs(), last };
    loop {
        match timeout_at(deadline, call(address, &connector, me)).await {
            Ok(Ok(peer)) => return Ok(peer),
            Ok(Err(error)) => {
                debug!(error, "rank 0 is not there yet");
                last = error;
            }
            Err(_) => return Err(unreachable(last)),
        }
        if timeout_at(deadline, sleep(RETRY_PAUSE)).await.is_err() {
            return Err(unreachable(last));
        }
    }
}

async fn call(address: SocketAddr, connector: &TlsConnector, me: &Hello) -> Result<Peer, String> {
    let open = async {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let name = NODE_DNS_NAME.try_into().expect("the constant is a DNS name");
        connector.connect(name, stream).await
    };
    let stream = match timeout(HELLO_LIMIT, open).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(error.to_string()),
        Err(_) => return Err("the connection was not made in time".to_owned()),
    };
    let mut peer = Peer::new(0, stream);
    peer.send(me).await.map_err(|error| error.to_string())?;
    match peer.receive().await? {
        Answer::Welcome => Ok(peer),
        Answer::Refused { reason } => Err(format!("refused: {reason}")),
    }
}

fn encode(message: &impl Serialize) -> Vec<u8> {
    let mut line = serde_json::to_vec(message).expect("messages have no maps with odd keys");
    line.push(b'\n');
    line
}

async fn write(writer: &mut WriteHalf<TlsStream<TcpStream>>, line: &[u8]) -> io::Result<()> {
    writer.write_all(line).await?;
    writer.flush().await
}

/// The next line's message; the error is a sentence.
async fn read<T: DeserializeOwned>(
    lines: &mut FramedRead<ReadHalf<TlsStream<TcpStream>>, LinesCodec>,
) -> Result<T, String> {
    match lines.next().await {
        Some(Ok(line)) => serde_json::from_str(&line)
            .map_err(|error| format!("it sent something that is no message: {error}")),
        Some(Err(LinesCodecError::MaxLineLengthExceeded)) => {
            Err(format!("it sent a line of more than {LINE_BYTES_MAX} bytes"))
        }
        // A process that is killed sends no TLS farewell.
        Some(Err(LinesCodecError::Io(error))) if error.kind() != io::ErrorKind::UnexpectedEof => {
            Err(error.to_string())
        }
        Some(Err(LinesCodecError::Io(_))) | None => Err("it closed the connection".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{IpAddr, Ipv4Addr},
        path::Path,
        time::{SystemTime, UNIX_EPOCH},
    };

    use exo_trust::{Authority, GROUP_NODES, Subject, write_private};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    /// Certificates of a cluster with one node.
    fn cluster(dir: &Path) -> TlsPaths {
        let now_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let authority = Authority::open_or_create(dir, now_s).unwrap();
        let subject = Subject { name: "n1".to_owned(), groups: vec![GROUP_NODES.to_owned()] };
        let issued = authority.issue(&subject, Some(&[]), now_s).unwrap();
        let paths = TlsPaths::in_dir(dir);
        write_private(&paths.cert, issued.certificate_pem.as_bytes()).unwrap();
        write_private(&paths.key, issued.key_pem.as_bytes()).unwrap();
        paths
    }

    fn hello(rank: u32) -> Hello {
        Hello { group: "g".to_owned(), epoch: 3, rank, world_size: 3, protocol: PROTOCOL }
    }

    async fn listener() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind((IpAddr::V4(Ipv4Addr::LOCALHOST), 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    fn step() -> RankCommand {
        RankCommand::Decode(vec![Feed { seq: 1, token: 7, draw: 2 }])
    }

    #[tokio::test]
    async fn ranks_meet_talk_and_miss_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let tls = cluster(dir.path());
        let (listener, address) = listener().await;
        let (me, one, two) = (hello(0), hello(1), hello(2));
        let (gathered, first, second) = tokio::join!(
            gather(&listener, &tls, &me, LIMIT),
            connect(address, &tls, &one, LIMIT),
            connect(address, &tls, &two, LIMIT),
        );
        let (mut senders, mut receivers): (Vec<_>, Vec<_>) =
            gathered.unwrap().into_iter().map(Peer::split).unzip();
        assert_eq!(receivers.iter().map(Receiver::rank).collect::<Vec<_>>(), [1, 2]);
        let (mut first_out, mut first_in) = first.unwrap().split();
        let second = second.unwrap().split();

        send_all(&mut senders, &step()).await.unwrap();
        assert_eq!(first_in.receive::<RankCommand>().await.unwrap(), step());
        first_out.send(&RankNote::Loaded).await.unwrap();
        assert_eq!(receivers[0].receive::<RankNote>().await.unwrap(), RankNote::Loaded);

        drop(second);
        let lost = receivers[1].receive::<RankNote>().await.unwrap_err();
        assert!(lost.to_string().starts_with("lost rank 2: "), "{lost}");
        drop((senders, receivers));
        let lost = first_in.receive::<RankCommand>().await.unwrap_err();
        assert!(lost.to_string().starts_with("lost rank 0: "), "{lost}");
    }

    #[tokio::test]
    async fn strangers_are_turned_away_and_missing_ranks_named() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let (tls, other_tls) = (cluster(dirs[0].path()), cluster(dirs[1].path()));
        let (listener, address) = listener().await;
        let short = Duration::from_secs(2);
        let me = hello(0);
        let other_group = Hello { group: "h".to_owned(), ..hello(1) };
        let (one, two) = (hello(1), hello(2));
        let (gathered, refused, stranger, _welcome) = tokio::join!(
            gather(&listener, &tls, &me, short),
            connect(address, &tls, &other_group, Duration::from_secs(1)),
            connect(address, &other_tls, &two, Duration::from_secs(1)),
            connect(address, &tls, &one, short),
        );
        assert_eq!(
            gathered.unwrap_err().to_string(),
            "rank 2 did not connect within 2 s (turned away: group is g, not h)"
        );
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains("refused: group is g, not h"), "{refused}");
        assert!(stranger.is_err());
    }

    #[tokio::test]
    async fn a_line_without_end_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let tls = cluster(dir.path());
        let (listener, address) = listener().await;
        let me = Hello { world_size: 2, ..hello(0) };
        let other = Hello { world_size: 2, ..hello(1) };
        let (gathered, peer) = tokio::join!(
            gather(&listener, &tls, &me, LIMIT),
            connect(address, &tls, &other, LIMIT)
        );
        let (_sender, mut receiver) = gathered.unwrap().remove(0).split();
        let mut peer = peer.unwrap();
        let flood = vec![b'x'; LINE_BYTES_MAX + 10];
        let (sent, received) =
            tokio::join!(write(&mut peer.writer, &flood), receiver.receive::<RankNote>());
        sent.unwrap();
        assert!(received.unwrap_err().to_string().contains("bytes"));
    }

    #[test]
    fn what_is_wrong_with_a_hello_is_said() {
        for (other, expect) in [
            (hello(1), None),
            (Hello { group: "h".to_owned(), ..hello(1) }, Some("group is g, not h")),
            (Hello { epoch: 4, ..hello(1) }, Some("epoch is 3, not 4")),
            (Hello { world_size: 2, ..hello(1) }, Some("world size is 3, not 2")),
            (hello(0), Some("there is no rank 0 to be had")),
            (hello(3), Some("there is no rank 3 to be had")),
        ] {
            assert_eq!(hello(0).objection(&other).as_deref(), expect);
        }
        // From before there was a number.
        let old = r#"{"group": "g", "epoch": 3, "rank": 2, "world_size": 3}"#;
        let objection = hello(0).objection(&serde_json::from_str(old).unwrap()).unwrap();
        assert!(
            objection.starts_with("rank 2 runs another version of exo than rank 0 (protocol 0")
        );
    }
}
