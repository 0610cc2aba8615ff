//! Which neighbour of this rank in a ring is missing or gone, seen from the process's own sockets: MLX says neither.
//! Owns the looking; never takes a byte that MLX waits for, and is asked only when something is wrong.

use std::ffi::c_void;
use std::fmt;
use std::fs;
use std::io;
use std::mem::ManuallyDrop;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{FromRawFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// What tells that the peer sends no more.
#[cfg(target_os = "linux")]
const CLOSED: libc::c_short = libc::POLLRDHUP;
#[cfg(not(target_os = "linux"))]
const CLOSED: libc::c_short = libc::POLLHUP;

/// Of this process; it has one group.
static RING: OnceLock<Ring> = OnceLock::new();

/// Remembers the ring that MLX's environment variables describe. Nothing is kept if they describe none: MLX says why.
pub(super) fn remember_ring() {
    if let Some(ring) = Ring::from_env() {
        RING.get_or_init(|| ring);
    }
}

/// From now on a neighbour without a connection is gone.
pub(super) fn ring_is_formed() {
    if let Some(ring) = RING.get() {
        ring.formed.store(true, Ordering::Relaxed);
    }
}

/// The neighbours that are gone, else those that are not connected, with their ranks and addresses. None if all are
/// there, and with other backends than the ring.
pub(super) fn trouble() -> Option<String> {
    RING.get()?.trouble()
}

/// The neighbours that are gone from a ring that was formed, if any. For whoever waits: MLX may never say so.
pub fn gone() -> Option<String> {
    RING.get().filter(|ring| ring.formed.load(Ordering::Relaxed))?.trouble()
}

/// As `trouble`, but if all neighbours are connected, names them: one of them does not go on. For whoever has
/// waited too long for the group.
pub fn suspects() -> Option<String> {
    let ring = RING.get()?;
    let all = || format!("{} does not answer", list(&ring.neighbours(), " or "));
    Some(ring.trouble().unwrap_or_else(all))
}

struct Ring {
    rank: usize,
    /// Where each rank listens.
    hosts: Vec<Vec<SocketAddr>>,
    /// All neighbours were connected once. A connection that its peer has reset no longer says whose it was.
    formed: AtomicBool,
}

/// A rank next to this one.
#[derive(Clone, Copy)]
struct Neighbour<'a> {
    rank: usize,
    listens: &'a [SocketAddr],
}

impl fmt::Display for Neighbour<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {}", self.rank)?;
        self.listens.first().map_or(Ok(()), |address| write!(f, " ({address})"))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    /// There is no connection.
    Absent,
    Open,
    /// The other side has closed it, or its host says that nobody has it any more.
    Closed,
}

impl Ring {
    fn from_env() -> Option<Self> {
        let rank = std::env::var("MLX_RANK").ok()?.parse().ok()?;
        Self::parse(rank, &fs::read(std::env::var_os("MLX_HOSTFILE")?).ok()?)
    }

    /// `hosts` is MLX's host file: for each rank a list of `ip:port`.
    fn parse(rank: usize, hosts: &[u8]) -> Option<Self> {
        let hosts: Vec<Vec<String>> = serde_json::from_slice(hosts).ok()?;
        let resolve = |names: Vec<String>| {
            names.iter().filter_map(|name| name.to_socket_addrs().ok()?.next()).collect()
        };
        let hosts: Vec<Vec<SocketAddr>> = hosts.into_iter().map(resolve).collect();
        let formed = AtomicBool::new(false);
        (rank < hosts.len()).then_some(Self { rank, hosts, formed })
    }

    /// The rank that connects to this one.
    fn before(&self) -> Neighbour<'_> {
        self.neighbour(self.rank + self.hosts.len() - 1)
    }

    /// The rank that this one connects to.
    fn behind(&self) -> Neighbour<'_> {
        self.neighbour(self.rank + 1)
    }

    fn neighbour(&self, rank: usize) -> Neighbour<'_> {
        let rank = rank % self.hosts.len();
        Neighbour { rank, listens: &self.hosts[rank] }
    }

    /// Each rank once, in order.
    fn neighbours(&self) -> Vec<Neighbour<'_>> {
        let mut both = vec![self.before(), self.behind()];
        both.sort_by_key(|n| n.rank);
        both.dedup_by_key(|n| n.rank);
        both.retain(|n| n.rank != self.rank);
        both
    }

    fn trouble(&self) -> Option<String> {
        let sockets: Vec<Socket> = open_files().into_iter().filter_map(Socket::of).collect();
        let listens = &self.hosts[self.rank];
        // What this rank accepted has the address that it listens at.
        let accepted = |socket: &Socket| listens.contains(&socket.own);
        let behind = self.behind();
        let connected = |socket: &Socket| behind.listens.contains(&socket.peer);
        let links =
            [(self.before(), link(&sockets, accepted)), (behind, link(&sockets, connected))];
        let troubled = |wanted: Link| -> Vec<Neighbour<'_>> {
            let is =
                |n: &Neighbour<'_>| links.iter().any(|(m, l)| m.rank == n.rank && *l == wanted);
            self.neighbours().into_iter().filter(is).collect()
        };
        let (mut gone, mut absent) = (troubled(Link::Closed), troubled(Link::Absent));
        if self.formed.load(Ordering::Relaxed) {
            gone.append(&mut absent);
            gone.sort_by_key(|n| n.rank);
            gone.dedup_by_key(|n| n.rank);
        }
        match (gone.len(), absent.len()) {
            (0, 0) => None,
            (0, 1) => Some(format!("{} is not connected", list(&absent, " and "))),
            (0, _) => Some(format!("{} are not connected", list(&absent, " and "))),
            (1, _) => Some(format!("{} is gone", list(&gone, " and "))),
            (_, _) => Some(format!("{} are gone", list(&gone, " and "))),
        }
    }
}

fn list(neighbours: &[Neighbour<'_>], separator: &str) -> String {
    let names: Vec<String> = neighbours.iter().map(ToString::to_string).collect();
    names.join(separator)
}

/// A connected socket of this process.
struct Socket {
    file: RawFd,
    own: SocketAddr,
    peer: SocketAddr,
}

fn link(sockets: &[Socket], is: impl Fn(&Socket) -> bool) -> Link {
    let mut found = Link::Absent;
    for socket in sockets.iter().filter(|socket| is(socket)) {
        if socket.is_closed() {
            return Link::Closed;
        }
        found = Link::Open;
    }
    found
}

/// Numbers of this process's open files.
fn open_files() -> Vec<RawFd> {
    let entries = fs::read_dir("/dev/fd").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

impl Socket {
    /// None for what is no connected TCP socket.
    fn of(file: RawFd) -> Option<Self> {
        // SAFETY: the stream is never dropped, so the file stays open and MLX's; a file that is no socket, or was
        // closed meanwhile, gives an error.
        let stream = unsafe { ManuallyDrop::new(TcpStream::from_raw_fd(file)) };
        Some(Self { file, own: stream.local_addr().ok()?, peer: stream.peer_addr().ok()? })
    }

    /// Also where something that the peer has sent before is still to be read.
    fn is_closed(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.file, events: CLOSED, revents: 0 };
        // SAFETY: one entry, which lives as long as the call; it does not wait.
        let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
        (ready > 0 && poll.revents & (CLOSED | libc::POLLHUP | libc::POLLERR) != 0)
            || self.is_at_end()
    }

    /// Nothing is left to be read, and nothing more will come.
    fn is_at_end(&self) -> bool {
        let mut byte = [0_u8; 1];
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
        // SAFETY: the buffer is live and one byte long. The byte stays in the socket.
        let read = unsafe { libc::recv(self.file, byte.as_mut_ptr().cast::<c_void>(), 1, flags) };
        match read {
            0 => true,
            1.. => false,
            _ => {
                let error = io::Error::last_os_error().kind();
                !matches!(error, io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::TcpListener;

    use super::*;

    fn listen() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    #[test]
    fn neighbours_are_named_by_what_their_sockets_say() {
        let (own, own_address) = listen();
        let (behind, behind_address) = listen();
        let (_before, before_address) = listen();
        let hosts = [own_address, behind_address, before_address].map(|a| [a.to_string()]);
        let ring = Ring::parse(0, serde_json::to_string(&hosts).unwrap().as_bytes()).unwrap();
        let (one, two) =
            (format!("rank 1 ({behind_address})"), format!("rank 2 ({before_address})"));

        assert_eq!(ring.trouble(), Some(format!("{one} and {two} are not connected")));
        let connected = TcpStream::connect(behind_address).unwrap();
        let (mut behind_end, _) = behind.accept().unwrap();
        assert_eq!(ring.trouble(), Some(format!("{two} is not connected")));
        let before_end = TcpStream::connect(own_address).unwrap();
        let (accepted, _) = own.accept().unwrap();
        assert_eq!(ring.trouble(), None);

        // What was sent before is not read.
        behind_end.write_all(b"x").unwrap();
        drop(behind_end);
        assert_eq!(ring.trouble(), Some(format!("{one} is gone")));
        drop(before_end);
        assert_eq!(ring.trouble(), Some(format!("{one} and {two} are gone")));
        drop((connected, accepted));
        assert_eq!(ring.trouble(), Some(format!("{one} and {two} are not connected")));
        ring.formed.store(true, Ordering::Relaxed);
        assert_eq!(ring.trouble(), Some(format!("{one} and {two} are gone")));
    }

    #[test]
    fn a_peer_on_both_sides_is_named_once() {
        let hosts = br#"[["127.0.0.1:1"], ["127.0.0.1:2"]]"#;
        let ring = Ring::parse(1, hosts).unwrap();
        assert_eq!(ring.trouble().as_deref(), Some("rank 0 (127.0.0.1:1) is not connected"));
        assert!(Ring::parse(2, hosts).is_none(), "there are two ranks");
        assert!(Ring::parse(0, b"[7]").is_none());
    }
}
