//! A member of the control plane is also a Node, unless it runs no agent: when that Node is deleted,
//! the member goes too.
//!
//! Each such Node holds a finalizer, so that its deletion is seen by whoever leads, now or later.
//! Runs where the store is led.

use std::{collections::BTreeSet, net::SocketAddr, path::Path, time::Duration};

use exo_crds::Node;
use exo_store::{Member, Store};
use kube::{
    Api, Client, ResourceExt as _,
    api::{ListParams, Patch, PatchParams},
};
use serde_json::json;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::{
    control,
    data_dir::{known_members, save_members},
    kubeconfig,
};

pub(crate) const FINALIZER: &str = "exo.dev/control-plane-member";
/// People wait for a deletion.
const PERIOD: Duration = Duration::from_secs(1);
/// How often a node asks the leader whether it still belongs.
const ASK_PERIOD: Duration = Duration::from_secs(10);

/// What one Node needs.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// Hold its deletion up.
    Hold,
    /// Take the member out, then let the Node go.
    Remove(u64),
    /// Nothing is left to take out.
    Release,
}

fn step(node: &Node, members: &[Member]) -> Option<Step> {
    let member = members.iter().find(|m| m.name == node.name_any());
    let held = node.finalizers().iter().any(|f| f == FINALIZER);
    // Another one can take the only vote over.
    let stays = |member: &Member| member.is_voter && members.len() == 1;
    match (member, held, node.metadata.deletion_timestamp.is_some()) {
        (Some(_), false, false) => Some(Step::Hold),
        // Without it there is no store: it stays, and its agent makes the Node again.
        (Some(member), true, true) if stays(member) => Some(Step::Release),
        (Some(member), false, true) if stays(member) => None,
        (Some(member), _, true) => Some(Step::Remove(member.id)),
        (None, true, _) => Some(Step::Release),
        (Some(_), true, false) | (None, false, _) => None,
    }
}

/// Looks after Nodes and members while this node leads.
pub(crate) async fn run(store: Store, client: Client, stop: CancellationToken) {
    let leads = store.leads();
    let mut ticks = interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            // Cancel-safe: nothing has been started in this round.
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        if !*leads.borrow() {
            continue;
        }
        let members = store.members();
        let api: Api<Node> = Api::all(client.clone());
        let nodes = match api.list(&ListParams::default()).await {
            Ok(nodes) => nodes.items,
            Err(error) => {
                debug!(%error, "nodes can't be listed");
                continue;
            }
        };
        for node in &nodes {
            let Some(step) = step(node, &members) else { continue };
            // Leadership is looked at before every act.
            let leads_now = *leads.borrow();
            if leads_now {
                act(&store, &api, node, step).await;
            }
        }
    }
}

async fn act(store: &Store, api: &Api<Node>, node: &Node, step: Step) {
    let name = node.name_any();
    let mut finalizers: BTreeSet<&str> = node.finalizers().iter().map(String::as_str).collect();
    match step {
        Step::Hold => {
            finalizers.insert(FINALIZER);
        }
        Step::Remove(id) => match store.remove_node(id).await {
            Ok(()) => {
                info!(node = name, "removed from the control plane: its Node was deleted");
                finalizers.remove(FINALIZER);
            }
            Err(error) => {
                return warn!(node = name, %error, "can't be removed from the control plane yet");
            }
        },
        Step::Release => {
            finalizers.remove(FINALIZER);
        }
    }
    let patch = json!({"metadata": {
        "finalizers": finalizers,
        "resourceVersion": node.metadata.resource_version,
    }});
    if let Err(error) = api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await {
        // A conflict, as a rule: the next round sees what was written.
        debug!(node = name, %error, "finalizers can't be written");
    }
}

/// Keeps in the data directory, and in the kubeconfig there, who else serves the API. `own` is this
/// node's address. Never returns: drop the future to stop.
pub(crate) async fn remember(store: &Store, data: &Path, own: SocketAddr) {
    let mut ticks = interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let own = own.to_string();
    let mut notes = Notes::new(data);
    loop {
        ticks.tick().await;
        let members = store.members();
        // A node that is not a member yet knows nobody.
        if members.is_empty() {
            continue;
        }
        let others: Vec<_> =
            members.into_iter().map(|m| m.address).filter(|address| *address != own).collect();
        if let Some(problem) = notes.keep(&others) {
            warn!("the other API servers can't be written down: {problem}");
        }
    }
}

/// What is written down of the other API servers, and where.
struct Notes<'d> {
    data: &'d Path,
    saved: Vec<String>,
    in_kubeconfig: Vec<String>,
    /// The last problem, until there is none.
    problem: Option<String>,
}

impl<'d> Notes<'d> {
    /// The kubeconfig was written from the same file.
    fn new(data: &'d Path) -> Self {
        let saved = known_members(data);
        Self { data, in_kubeconfig: saved.clone(), saved, problem: None }
    }

    /// Writes what is not there yet. Returns a problem when it is a new one.
    fn keep(&mut self, others: &[String]) -> Option<String> {
        let problem = self.write(others).err().map(|error| format!("{error:#}"));
        let is_known = self.problem == problem;
        self.problem.clone_from(&problem);
        problem.filter(|_| !is_known)
    }

    fn write(&mut self, others: &[String]) -> anyhow::Result<()> {
        if self.saved != others {
            save_members(self.data, others)?;
            self.saved = others.to_vec();
        }
        if self.in_kubeconfig != others {
            kubeconfig::set_servers(&self.data.join("kubeconfig"), others)?;
            self.in_kubeconfig = others.to_vec();
        }
        Ok(())
    }
}

/// Returns when this node has been taken out of the cluster by others.
pub(crate) async fn removed(store: Store, id: u64, client: reqwest::Client) {
    let mut ticks = interval(ASK_PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        for member in store.members().iter().filter(|m| m.id != id) {
            let Ok(now) = control::members_at(&client, &member.address).await else { continue };
            // Others may be behind, and not know yet that this node has come. Who took the place of a
            // member that is known here has another id, and may lead a cluster of its own.
            let knows = |id| now.members.iter().any(|m| m.id == id);
            if now.leads && knows(member.id) && !knows(id) {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use exo_crds::NodeSpec;
    use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};

    use super::*;

    #[test]
    fn a_kubeconfig_that_can_not_be_read_is_told_of_once() {
        let dir = tempfile::tempdir().unwrap();
        let (members, kubeconfig) = (dir.path().join("members"), dir.path().join("kubeconfig"));
        let others = ["192.0.2.2:8443".to_owned()];
        let mut notes = Notes::new(dir.path());
        std::fs::write(&kubeconfig, "clusters: [").unwrap();
        let problem = notes.keep(&others).unwrap();
        assert!(problem.contains("kubeconfig"), "{problem}");
        assert_eq!(known_members(dir.path()), others);
        // Neither another word, nor another write of what is there.
        std::fs::remove_file(&members).unwrap();
        assert_eq!(notes.keep(&others), None);
        assert!(!members.exists());
        // Removed, there is nothing to name them in.
        std::fs::remove_file(&kubeconfig).unwrap();
        assert_eq!(notes.keep(&others), None);
        std::fs::write(&kubeconfig, "clusters: [").unwrap();
        assert!(notes.keep(&["192.0.2.3:8443".to_owned()]).is_some(), "new trouble");
    }

    #[test]
    fn a_member_goes_with_its_node() {
        let member = |id: u64, name: &str| Member {
            id,
            name: name.to_owned(),
            address: String::new(),
            is_voter: true,
        };
        let members = [member(7, "a"), member(8, "c")];
        let check = |name: &str, held: bool, deleted: bool, wanted: Option<Step>| {
            let mut node = Node::new(name, NodeSpec::default());
            let finalizers = [Some("other/one"), held.then_some(FINALIZER)];
            node.metadata.finalizers =
                Some(finalizers.into_iter().flatten().map(str::to_owned).collect());
            node.metadata.deletion_timestamp = deleted.then_some(Time(Timestamp::UNIX_EPOCH));
            assert_eq!(step(&node, &members), wanted, "{name} {held} {deleted}");
        };
        check("a", false, false, Some(Step::Hold));
        check("a", true, false, None);
        check("a", true, true, Some(Step::Remove(7)));
        check("a", false, true, Some(Step::Remove(7)));
        check("b", true, true, Some(Step::Release));
        check("b", true, false, Some(Step::Release));
        check("b", false, false, None);
    }

    #[test]
    fn the_only_member_stays() {
        let member = |id: u64, name: &str, is_voter: bool| Member {
            id,
            name: name.to_owned(),
            address: String::new(),
            is_voter,
        };
        let both = [member(7, "a", true), member(8, "b", false)];
        let deleted = |name: &str| {
            let mut node = Node::new(name, NodeSpec::default());
            node.metadata.finalizers = Some(vec![FINALIZER.to_owned()]);
            node.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
            node
        };
        assert_eq!(step(&deleted("a"), &both[..1]), Some(Step::Release));
        assert_eq!(step(&deleted("a"), &both), Some(Step::Remove(7)));
        assert_eq!(step(&deleted("b"), &both), Some(Step::Remove(8)));
    }
}
