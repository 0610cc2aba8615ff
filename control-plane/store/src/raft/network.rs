//! openraft's network: its calls to followers, candidates' calls for votes, snapshots in chunks.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use openraft::{
    SnapshotMeta, Vote,
    error::{
        Fatal, InstallSnapshotError, NetworkError, PayloadTooLarge, RPCError, RaftError,
        RemoteError, Unreachable,
    },
    network::{Backoff, RPCOption, RaftNetwork, RaftNetworkFactory},
    raft::{
        AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest,
        InstallSnapshotResponse, VoteRequest, VoteResponse,
    },
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::time::{Instant, timeout};

use super::{
    MemberNode, TypeConfig,
    call::{CallError, Caller, Target},
    flushing::Flushing,
    line::Line,
};

/// A body of appends ends about here; longer ones are cut in two. openraft waits for the answer for
/// a heartbeat's time, so that a follower with 100 Mbit/s must be able to take it in.
const APPEND_BYTES: usize = 1 << 20;
/// An unreachable node is tried again after this long.
const RETRY: Duration = Duration::from_millis(200);

/// A follower hears of commits at most so much later, so that it need not be told again.
const FLUSH_PATIENCE: Duration = Duration::from_millis(20);
/// Entries that come within this time take the news of a commit along: a client that writes one
/// after the other needs as long between two.
const TELL_AFTER: Duration = Duration::from_millis(2);
/// A follower hears of its leader this often, whatever is on its way.
const TELL_AT_LEAST: Duration = Duration::from_millis(50);
/// Whoever asked for something within this time, in milliseconds, may do so again.
const ASKING_MS: u64 = 1_000;

/// Makes connections.
pub(super) struct Peers {
    pub(super) caller: Caller,
    pub(super) flushing: Flushing,
    pub(super) telling: Telling,
    pub(super) silence: Silence,
}

/// One other node.
pub(super) struct Peer {
    caller: Caller,
    flushing: Flushing,
    telling: Telling,
    silence: Silence,
    target: Target,
    /// For the stream of calls that carry entries or say how far they are committed. Questions are
    /// asked by a peer that is made for each: those go by the connections that all share.
    line: Line,
    /// When it last answered a call for entries. openraft has one stream of these for each
    /// follower, and asks its questions by others.
    called: Option<Instant>,
}

/// Whether this node calls nobody as a leader, and why.
#[derive(Clone, Default)]
pub(super) struct Silence {
    without_majority: Arc<AtomicBool>,
    hands_over: Arc<AtomicBool>,
}

impl Silence {
    /// No majority answers it.
    pub(super) fn without_majority(&self, is_silent: bool) {
        self.without_majority.store(is_silent, Ordering::Relaxed);
    }

    /// Another one is to lead.
    pub(super) fn hand_over(&self, is_silent: bool) {
        self.hands_over.store(is_silent, Ordering::Relaxed);
    }

    fn reason(&self) -> Option<&'static str> {
        if self.without_majority.load(Ordering::Relaxed) {
            Some("not called: no majority answers this leader")
        } else if self.hands_over.load(Ordering::Relaxed) {
            Some("not called: another node is to lead")
        } else {
            None
        }
    }
}

/// Whether other nodes wait to hear of commits: those whose writes and reads come here.
#[derive(Clone)]
pub(super) struct Telling {
    began: Instant,
    /// Milliseconds from the beginning to the last time that one asked; 0 for never.
    asked_ms: Arc<AtomicU64>,
}

impl Telling {
    pub(super) fn new() -> Self {
        Self { began: Instant::now(), asked_ms: Arc::default() }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Another node asked for something.
    pub(super) fn asked(&self) {
        self.asked_ms.store(self.now_ms().max(1), Ordering::Relaxed);
    }

    fn is_urgent(&self) -> bool {
        let asked_ms = self.asked_ms.load(Ordering::Relaxed);
        asked_ms > 0 && self.now_ms().saturating_sub(asked_ms) < ASKING_MS
    }
}

type Result<T, E = RaftError<u64>> = std::result::Result<T, RPCError<u64, MemberNode, E>>;

/// What stands before a chunk's bytes, in one line of JSON.
#[derive(Serialize, Deserialize)]
struct ChunkHead {
    vote: Vote<u64>,
    meta: SnapshotMeta<u64, MemberNode>,
    offset: u64,
    done: bool,
}

/// A chunk as it travels: bytes in JSON would be four times as long.
pub(super) fn encode_chunk(chunk: InstallSnapshotRequest<TypeConfig>) -> Vec<u8> {
    let InstallSnapshotRequest { vote, meta, offset, data, done } = chunk;
    let mut body = json(&ChunkHead { vote, meta, offset, done });
    body.push(b'\n');
    body.extend_from_slice(&data);
    body
}

/// `None` for what [`encode_chunk`] did not write.
pub(super) fn decode_chunk(body: &[u8]) -> Option<InstallSnapshotRequest<TypeConfig>> {
    let end = body.iter().position(|byte| *byte == b'\n')?;
    let (head, data) = body.split_at(end);
    let ChunkHead { vote, meta, offset, done } = serde_json::from_slice(head).ok()?;
    Some(InstallSnapshotRequest { vote, meta, offset, data: data[1..].to_vec(), done })
}

pub(super) fn json<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("these types have text keys only and no failing serializers")
}

impl Peer {
    /// Lets a call without entries wait for those that follow, if nobody is in a hurry: a follower's
    /// next entries say what is committed as well, and would have to wait for the end of this call.
    ///
    /// # Errors
    /// When there are entries for this follower now; openraft sends them after that.
    async fn hold_back(&self, request: &AppendEntriesRequest<TypeConfig>) -> Result<()> {
        let heard_lately = self.called.is_some_and(|at| at.elapsed() < TELL_AT_LEAST);
        let Some(known) = request.prev_log_id.filter(|_| heard_lately) else { return Ok(()) };
        if self.telling.is_urgent() {
            return Ok(());
        }
        match timeout(TELL_AFTER, self.flushing.proposed_after(known.index)).await {
            Ok(()) => Err(NetworkError::new(&io::Error::other("entries follow")).into()),
            Err(_) => Ok(()),
        }
    }

    fn check_silence(&self) -> std::result::Result<(), Unreachable> {
        match self.silence.reason() {
            Some(reason) => Err(Unreachable::new(&io::Error::other(reason))),
            None => Ok(()),
        }
    }

    async fn call<T, E>(
        &self,
        call: &str,
        body: Vec<u8>,
        limit: Duration,
    ) -> Result<T, RaftError<u64, E>>
    where
        T: DeserializeOwned,
        E: DeserializeOwned + std::error::Error,
    {
        type Answer<T, E> = std::result::Result<T, RaftError<u64, E>>;
        let answer: Answer<T, E> =
            self.caller.post(&self.target, call, body, limit).await.map_err(fault)?;
        answer.map_err(|error| self.refused(error))
    }

    fn refused<E: std::error::Error>(
        &self,
        error: RaftError<u64, E>,
    ) -> RPCError<u64, MemberNode, RaftError<u64, E>> {
        match error {
            // Not a reason to stop here; the node may be started again.
            RaftError::Fatal(Fatal::Stopped) => Unreachable::new(&Fatal::<u64>::Stopped).into(),
            error => RemoteError::new(self.target.id, error).into(),
        }
    }
}

fn fault<E: std::error::Error>(error: CallError) -> RPCError<u64, MemberNode, E> {
    match error {
        // Pauses before the next try.
        CallError::NotDone(text) => Unreachable::new(&io::Error::other(text)).into(),
        CallError::Unknown(text) => NetworkError::new(&io::Error::other(text)).into(),
    }
}

impl RaftNetworkFactory<TypeConfig> for Peers {
    type Network = Peer;

    async fn new_client(&mut self, id: u64, node: &MemberNode) -> Peer {
        Peer {
            caller: self.caller.clone(),
            flushing: self.flushing.clone(),
            telling: self.telling.clone(),
            silence: self.silence.clone(),
            target: Target { id, address: node.addr.clone() },
            line: Line::default(),
            called: None,
        }
    }
}

impl RaftNetwork<TypeConfig> for Peer {
    async fn append_entries(
        &mut self,
        mut request: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<u64>> {
        self.check_silence()?;
        let carries = !request.entries.is_empty();
        if !carries {
            self.hold_back(&request).await?;
        }
        // A commit counts when it is on this disk too; see `log`. Entries need not wait for that:
        // their own commit will be told.
        if let Some(commit) = request.leader_commit {
            if !carries {
                let _ = timeout(FLUSH_PATIENCE, self.flushing.reached(commit.index)).await;
            }
            request.leader_commit = self.flushing.at_most(commit);
        }
        let body = json(&request);
        if body.len() > APPEND_BYTES && request.entries.len() > 1 {
            let half = request.entries.len() as u64 / 2;
            return Err(PayloadTooLarge::new_entries_hint(half).into());
        }
        let limit = option.hard_ttl();
        if !carries && self.called.is_none() {
            return self.call("append", body, limit).await;
        }
        let answer: std::result::Result<_, RaftError<u64>> = self
            .caller
            .post_by(&mut self.line, &self.target, "append", body, limit)
            .await
            .map_err(fault)?;
        let answer = answer.map_err(|error| self.refused(error))?;
        self.called = Some(Instant::now());
        Ok(answer)
    }

    async fn install_snapshot(
        &mut self,
        chunk: InstallSnapshotRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<InstallSnapshotResponse<u64>, RaftError<u64, InstallSnapshotError>> {
        self.check_silence()?;
        self.call("snapshot", encode_chunk(chunk), option.hard_ttl()).await
    }

    async fn vote(
        &mut self,
        request: VoteRequest<u64>,
        option: RPCOption,
    ) -> Result<VoteResponse<u64>> {
        self.call("vote", json(&request), option.hard_ttl()).await
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(RETRY))
    }
}

#[cfg(test)]
mod tests {
    use openraft::StoredMembership;

    use super::*;

    #[test]
    fn either_reason_keeps_a_leader_silent() {
        let silence = Silence::default();
        assert_eq!(silence.reason(), None);
        silence.hand_over(true);
        silence.without_majority(true);
        silence.without_majority(false);
        assert!(silence.reason().is_some(), "the other one holds");
        silence.hand_over(false);
        assert_eq!(silence.reason(), None);
    }

    #[test]
    fn chunks_come_back_whole() {
        let chunk = InstallSnapshotRequest {
            vote: Vote::new_committed(3, 1),
            meta: SnapshotMeta {
                last_log_id: None,
                last_membership: StoredMembership::default(),
                snapshot_id: "a\nb".to_owned(),
            },
            offset: 7,
            data: b"\n\x00{\"\n".to_vec(),
            done: true,
        };
        let body = encode_chunk(chunk.clone());
        let back = decode_chunk(&body).unwrap();
        assert_eq!(back, chunk);
        assert!(decode_chunk(b"{}").is_none());
        assert!(decode_chunk(b"{}\nx").is_none());
    }
}
