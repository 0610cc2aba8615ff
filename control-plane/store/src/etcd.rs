//! The backend that keeps the store in an etcd cluster.
//!
//! Owns: the translation to etcd's transactions, a copy of the data in memory that follows etcd's
//! watch, and the lease by which one node leads. Never: etcd's set-up, its snapshots or its
//! compaction beyond what callers ask for; run etcd with `--auto-compaction-retention`.
//!
//! Revisions are etcd's own. Everything is below one prefix, so that the copy's revision follows
//! every change that this store makes. History begins where this process began to follow.

use std::{collections::VecDeque, future::Future, sync::Arc, time::Duration};

use etcd_client::{
    Client, Compare, CompareOp, ConnectOptions, Error, EventType, GetOptions, KeyValue,
    Txn as EtcdTxn, TxnOp, TxnOpResponse, WatchOptions,
};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, timeout, timeout_at},
};

use crate::{
    StoreError,
    command::{Command, Entry, Meta, Op, Outcome, Txn},
    shared::Shared,
    state::{HistoryLimits, State},
    store::{Leadership, now_ms},
};

/// All of this store's keys begin so.
const PREFIX: &str = "/exo/";
/// Followed by the store's own keys.
const DATA: &str = "/exo/data";
/// Where nodes stand for election.
const ELECTION: &str = "/exo/leader";
/// A leader that is not heard of for so long is replaced.
const LEASE_S: u32 = 6;
/// The first copy is read in parts of so many keys.
const PAGE: i64 = 500;
/// An answer takes this long at most.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pause before a broken connection is tried again.
const RETRY: Duration = Duration::from_millis(200);
/// The copy may wait for a revision that changed nothing of ours; then etcd is asked.
const ASK_PROGRESS: Duration = Duration::from_millis(50);

/// Where etcd is, and who asks.
#[derive(Clone, Debug)]
pub struct EtcdConfig {
    /// `http://host:2379` or `https://…`, each.
    pub endpoints: Vec<String>,
    /// Name and password.
    pub user: Option<(String, String)>,
    pub tls: Option<EtcdTls>,
    /// Where other nodes reach this one, `IP:port`.
    pub address: String,
}

/// PEM texts.
#[derive(Clone)]
pub struct EtcdTls {
    pub ca: String,
    /// Certificate and key, where etcd asks for them.
    pub identity: Option<(String, String)>,
}

impl std::fmt::Debug for EtcdTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The key is nobody's business.
        f.write_str("EtcdTls")
    }
}

/// Why a store in etcd can't be opened.
#[derive(Debug, thiserror::Error)]
#[error("opening the store in etcd: {0}")]
pub struct EtcdError(String);

pub(crate) struct EtcdBackend {
    client: Client,
    shared: Arc<Shared>,
    ask_progress: Arc<tokio::sync::Notify>,
    leadership: watch::Receiver<Leadership>,
    leads: watch::Receiver<bool>,
    tasks: Vec<JoinHandle<()>>,
}

impl EtcdBackend {
    pub(crate) async fn open(config: EtcdConfig) -> Result<Self, EtcdError> {
        let text = |error: Error| EtcdError(error.to_string());
        let client =
            Client::connect(&config.endpoints, Some(options(&config))).await.map_err(text)?;
        let state = timeout(PATIENCE * 4, copy(&mut client.clone()))
            .await
            .map_err(|_| EtcdError("no answer in time".to_owned()))?
            .map_err(text)?;
        let shared = Shared::new(state);
        let ask_progress = Arc::new(tokio::sync::Notify::new());
        let (leadership_sender, leadership) = watch::channel(Leadership::default());
        let (leads_sender, leads) = watch::channel(false);
        let office = Office { address: config.address, leadership_sender, leads_sender };
        let following = follow(client.clone(), Arc::clone(&shared), Arc::clone(&ask_progress));
        let tasks =
            vec![tokio::spawn(following), tokio::spawn(office.stand_for_ever(client.clone()))];
        // Alone, a node leads from the beginning.
        let _ = timeout(Duration::from_secs(1), leads.clone().wait_for(|leads| *leads)).await;
        Ok(Self { client, shared, ask_progress, leadership, leads, tasks })
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(crate) fn leadership(&self) -> watch::Receiver<Leadership> {
        self.leadership.clone()
    }

    pub(crate) fn leads(&self) -> watch::Receiver<bool> {
        self.leads.clone()
    }

    pub(crate) async fn command(&self, command: Command) -> Result<Outcome, StoreError> {
        match command {
            Command::Txn(txn) => self.txn(&txn).await,
            Command::Compact { revision } => self.compact(revision).await,
        }
    }

    async fn txn(&self, txn: &Txn) -> Result<Outcome, StoreError> {
        if let Some(reason) = txn.flaw() {
            return Ok(Outcome::Invalid { reason });
        }
        let compares: Vec<_> = txn
            .compare
            .iter()
            .map(|c| Compare::mod_revision(key(&c.key), CompareOp::Equal, signed(c.mod_revision)))
            .collect();
        let changes: Vec<_> = txn
            .ops
            .iter()
            .map(|op| match op {
                Op::Put { key: name, value } => TxnOp::put(key(name), value.as_bytes(), None),
                Op::Delete { key: name } => TxnOp::delete(key(name), None),
            })
            .collect();
        let reads: Vec<_> = txn.compare.iter().map(|c| TxnOp::get(key(&c.key), None)).collect();
        let order = EtcdTxn::new().when(compares).and_then(changes).or_else(reads);
        let answer = bounded(self.client.kv_client().txn(order))
            .await
            .map_err(|error| write_fault(&error))?;
        let revision = unsigned(answer.header().map_or(0, |h| h.revision()));
        if answer.succeeded() {
            self.reach(revision).await.map_err(committed_unseen)?;
            return Ok(Outcome::Committed { revision });
        }
        let current = answer
            .op_responses()
            .iter()
            .map(|found| match found {
                TxnOpResponse::Get(found) => found.kvs().first().and_then(entry),
                _ => None,
            })
            .collect();
        Ok(Outcome::Conflict { revision, current })
    }

    async fn compact(&self, revision: u64) -> Result<Outcome, StoreError> {
        self.barrier().await?;
        let command = Command::Compact { revision };
        let outcome = self.shared.change(|state| {
            let meta = Meta { index: state.revision(), time_ms: now_ms() };
            state.apply(meta, &command)
        });
        if let Outcome::Committed { .. } = outcome {
            let mut kv = self.client.kv_client();
            match bounded(kv.compact(signed(revision), None)).await {
                // Another node was first.
                Err(Error::GRpcStatus(status)) if status.message().contains("compacted") => {}
                Ok(_) => {}
                Err(error) => return Err(write_fault(&error)),
            }
        }
        Ok(outcome)
    }

    /// Waits until the copy has everything acknowledged before the call.
    pub(crate) async fn barrier(&self) -> Result<(), StoreError> {
        let read_fault = |error: Error| StoreError::Unavailable(error.to_string());
        let options = GetOptions::new().with_count_only();
        let mut kv = self.client.kv_client();
        let answer = bounded(kv.get(ELECTION, Some(options))).await.map_err(read_fault)?;
        self.reach(unsigned(answer.header().map_or(0, |h| h.revision()))).await
    }

    async fn reach(&self, revision: u64) -> Result<(), StoreError> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let step = deadline.min(Instant::now() + ASK_PROGRESS);
            if timeout_at(step, self.shared.reached(revision)).await.is_ok() {
                return Ok(());
            }
            self.ask_progress.notify_one();
        }
        Err(StoreError::Unavailable(format!("this node has not seen revision {revision} in time")))
    }

    pub(crate) fn shutdown(&self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

fn options(config: &EtcdConfig) -> ConnectOptions {
    let mut options = ConnectOptions::new()
        .with_connect_timeout(PATIENCE)
        .with_keep_alive(Duration::from_secs(2), Duration::from_secs(2))
        .with_require_leader(true)
        .with_auto_token_refresh(true);
    if let Some((name, password)) = &config.user {
        options = options.with_user(name, password);
    }
    if let Some(tls) = &config.tls {
        let mut with = etcd_client::TlsOptions::new()
            .ca_certificate(etcd_client::Certificate::from_pem(&tls.ca));
        if let Some((certificate, private_key)) = &tls.identity {
            with = with.identity(etcd_client::Identity::from_pem(certificate, private_key));
        }
        options = options.with_tls(with);
    }
    options
}

async fn bounded<T>(call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    timeout(PATIENCE, call)
        .await
        .unwrap_or_else(|_| Err(Error::Internal("no answer in time".to_owned())))
}

/// gRPC's codes, by number: what was certainly not carried out.
fn write_fault(error: &Error) -> StoreError {
    let code = match error {
        Error::GRpcStatus(status) => i32::from(status.code()),
        _ => -1,
    };
    match code {
        // Invalid argument, out of range.
        3 | 11 => StoreError::Invalid(error.to_string()),
        // Permission denied, resource exhausted, unauthenticated.
        7 | 8 | 16 => StoreError::Unavailable(error.to_string()),
        _ => StoreError::Unknown(error.to_string()),
    }
}

/// The write is done, whatever it is that keeps this node from showing it: nobody may repeat it.
fn committed_unseen(error: StoreError) -> StoreError {
    match error {
        StoreError::Unavailable(text) => StoreError::Unknown(text),
        other => other,
    }
}

fn key(key: &str) -> String {
    format!("{DATA}{key}")
}

fn signed(revision: u64) -> i64 {
    i64::try_from(revision).unwrap_or(i64::MAX)
}

fn unsigned(revision: i64) -> u64 {
    u64::try_from(revision).unwrap_or(0)
}

/// `None` for keys that are not data, and for what this store never writes.
fn entry(found: &KeyValue) -> Option<Entry> {
    let key = found.key_str().ok()?.strip_prefix(DATA)?;
    Some(Entry {
        key: key.into(),
        value: found.value_str().ok()?.into(),
        create_revision: unsigned(found.create_revision()),
        mod_revision: unsigned(found.mod_revision()),
    })
}

/// Everything as of now.
async fn copy(client: &mut Client) -> Result<State, Error> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut revision = 0;
    let mut from = DATA.to_owned();
    // The byte after `/exo/data`'s last one ends the range.
    let end = "/exo/datb";
    loop {
        let options = GetOptions::new().with_range(end).with_limit(PAGE).with_revision(revision);
        let page = bounded(client.kv_client().get(from.as_str(), Some(options))).await?;
        if revision == 0 {
            revision = page.header().map_or(0, |h| h.revision());
        }
        entries.extend(page.kvs().iter().filter_map(entry));
        match page.kvs().last() {
            Some(last) if page.more() => from = format!("{}\0", last.key_str()?),
            _ => break,
        }
    }
    Ok(State::copied(HistoryLimits::DEFAULT, unsigned(revision), entries))
}

/// Keeps the copy up to date for ever.
async fn follow(mut client: Client, shared: Arc<Shared>, ask: Arc<tokio::sync::Notify>) {
    loop {
        match follow_once(&mut client, &shared, &ask).await {
            Ok(Lost::History) => {
                // What happened since is gone: begin anew. Watches are told that they missed it.
                match copy(&mut client).await {
                    Ok(state) => shared.change(|old| *old = state),
                    Err(error) => tracing::warn!(%error, "etcd can't be read"),
                }
            }
            Ok(Lost::Connection) => {}
            Err(error) => tracing::warn!(%error, "the watch on etcd broke off"),
        }
        sleep(RETRY).await;
    }
}

enum Lost {
    Connection,
    History,
}

async fn follow_once(
    client: &mut Client,
    shared: &Shared,
    ask: &tokio::sync::Notify,
) -> Result<Lost, Error> {
    let start = shared.read().revision() + 1;
    let options =
        WatchOptions::new().with_prefix().with_start_revision(signed(start)).with_progress_notify();
    let mut stream = client.watch(PREFIX, Some(options)).await?;
    loop {
        // Cancel-safe: a message that is not complete stays in the stream; a lost request for
        // progress is made again.
        let answer = tokio::select! {
            answer = stream.message() => answer?,
            () = ask.notified() => {
                stream.request_progress().await?;
                continue;
            }
        };
        let Some(answer) = answer else { return Ok(Lost::Connection) };
        if answer.compact_revision() > 0 {
            return Ok(Lost::History);
        }
        if answer.canceled() {
            return Ok(Lost::Connection);
        }
        let revision = unsigned(answer.header().map_or(0, |h| h.revision()));
        let mut changes = VecDeque::new();
        for event in answer.events() {
            let Some(found) = event.kv() else { continue };
            let at = unsigned(found.mod_revision());
            let Some(name) = found.key_str().ok().and_then(|k| k.strip_prefix(DATA)) else {
                continue;
            };
            let value = match event.event_type() {
                EventType::Put => found.value_str().ok().map(Into::into),
                EventType::Delete => None,
            };
            changes.push_back((at, name.into(), value));
        }
        // The header of a message with events may be newer than they are; a message without any
        // says that nothing else happened up to its revision.
        let seen =
            answer.events().last().and_then(|e| e.kv()).map(|kv| unsigned(kv.mod_revision()));
        let seen = seen.unwrap_or(if answer.created() { 0 } else { revision });
        shared.change(|state| state.follow(changes, seen));
    }
}

/// Stands for election, and says how it went.
struct Office {
    address: String,
    leadership_sender: watch::Sender<Leadership>,
    leads_sender: watch::Sender<bool>,
}

impl Office {
    async fn stand_for_ever(self, client: Client) {
        loop {
            let ended = self.stand(&client).await;
            self.tell(None);
            if let Err(error) = ended {
                tracing::warn!(%error, "the lease on leadership is lost");
            }
            sleep(RETRY).await;
        }
    }

    /// Until the lease is lost. Leadership ends before etcd gives it to another node: answers are
    /// waited for no longer than a third of the lease, after a third without asking.
    async fn stand(&self, client: &Client) -> Result<(), Error> {
        let mut leases = client.lease_client();
        let lease = bounded(leases.grant(i64::from(LEASE_S), None)).await?.id();
        let (mut keeper, mut answers) = bounded(leases.keep_alive(lease)).await?;
        let mut election = client.election_client();
        let campaign = election.campaign(ELECTION, self.address.as_str(), lease);
        tokio::pin!(campaign);
        let third = Duration::from_secs(LEASE_S.into()) / 3;
        let mut leads = false;
        loop {
            // Cancel-safe: the campaign is kept, and the pause holds nothing.
            tokio::select! {
                won = &mut campaign, if !leads => {
                    let won = won?;
                    leads = true;
                    self.tell(won.leader().map(|l| unsigned(l.rev())));
                }
                () = sleep(third) => {
                    keeper.keep_alive().await?;
                    let answer = timeout(third, answers.message()).await;
                    match answer {
                        Ok(Ok(Some(answer))) if answer.ttl() > 0 => {}
                        Ok(Err(error)) => return Err(error),
                        _ => return Err(Error::Internal("the lease has run out".to_owned())),
                    }
                }
            }
        }
    }

    /// The term is the revision of the election.
    fn tell(&self, term: Option<u64>) {
        self.leads_sender.send_replace(term.is_some());
        self.leadership_sender.send_replace(Leadership {
            is_leader: term.is_some(),
            term: term.unwrap_or(0),
            leader: term.map(|_| self.address.clone()),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_committed_is_not_offered_for_a_repetition() {
        let error = StoreError::Unavailable("this node has not seen revision 7 in time".to_owned());
        assert!(error.is_retryable());
        let error = committed_unseen(error);
        assert!(matches!(error, StoreError::Unknown(_)) && !error.is_retryable(), "{error}");
    }
}
