//! Members that begin anew and members that go, and the cluster that stays.

use std::fs;

use exo_tests::{Exo, Trio, members, wait_for};
use serde_json::Value;

const NAMESPACE: &str = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: kept\n";

/// The members as one node knows them: name, id, and whether it votes.
fn known(exo: &Exo) -> anyhow::Result<Vec<(String, u64, bool)>> {
    let answer = members(exo)?;
    let member = |m: &Value| {
        let name = m["name"].as_str().unwrap_or_default().to_owned();
        (name, m["id"].as_u64().unwrap_or_default(), m["voter"] == true)
    };
    Ok(answer["members"].as_array().into_iter().flatten().map(member).collect())
}

/// It would found an empty cluster in the name of the one that the others have.
#[test]
fn a_founder_whose_store_is_gone_joins_again_by_itself() {
    let mut trio = Trio::start(&["--no-agent"]).unwrap();
    let file = trio.place.dir.join("kept.yaml");
    fs::write(&file, NAMESPACE).unwrap();
    trio.exoctl_ok(1, &["apply", "-f", file.to_str().unwrap()]).unwrap();
    let founder = trio.nodes[0].name.clone();
    let before = known(&trio.nodes[1]).unwrap();
    let id_of = |members: &[(String, u64, bool)]| {
        members.iter().find(|(name, ..)| *name == founder).map(|(_, id, _)| *id)
    };
    let data_dir = trio.nodes[0].data_dir.clone();
    wait_for("it to write down who else is there", || {
        let others = fs::read_to_string(data_dir.join("members"))?;
        Ok((others.lines().count() == 2).then_some(()))
    })
    .unwrap();
    trio.nodes[0].kill().unwrap();
    fs::remove_dir_all(data_dir.join("raft")).unwrap();
    trio.nodes[0].restart().unwrap();
    let voters = wait_for("it is another member, and votes", || {
        let now = known(&trio.nodes[1])?;
        let is_new = id_of(&now).is_some() && id_of(&now) != id_of(&before);
        let votes = now.len() == 3 && now.iter().all(|(.., votes)| *votes);
        Ok((is_new && votes).then_some(now))
    });
    voters.unwrap_or_else(|error| panic!("{error:#}{}", trio.logs()));
    assert!(trio.nodes[0].log().contains("joins its cluster again"), "{}", trio.logs());
    for at in 0..3 {
        let found = trio.exoctl_ok(at, &["get", "namespace", "kept", "-o", "name"]).unwrap();
        assert!(found.contains("kept"), "{at}: {found}");
        assert_eq!(trio.nodes[at].exit_code().unwrap(), None, "{}", trio.logs());
    }
}

/// Its Node is deleted while it has the only vote: the other one gets it.
#[test]
fn the_only_voter_leaves_to_the_other_what_it_has() {
    let mut trio = Trio::start(&[]).unwrap();
    let file = trio.place.dir.join("kept.yaml");
    fs::write(&file, NAMESPACE).unwrap();
    let leader = trio.leader().unwrap();
    trio.exoctl_ok(leader, &["apply", "-f", file.to_str().unwrap()]).unwrap();
    let all: Vec<String> = trio.nodes.iter().map(|node| node.name.clone()).collect();
    // The leader goes first, then whoever has the vote of the two that are left.
    let mut left: Vec<usize> = vec![0, 1, 2];
    let mut goes = leader;
    while left.len() > 1 {
        let asked = *left.iter().find(|at| **at != goes).unwrap();
        let held = || {
            let node = trio.exoctl_ok(asked, &["get", "node", &all[goes], "-o", "yaml"])?;
            Ok(node.contains("control-plane-member").then_some(()))
        };
        wait_for("its Node to be held", held).unwrap();
        trio.exoctl_ok(asked, &["delete", "node", &all[goes]]).unwrap();
        left.retain(|at| *at != goes);
        let count = left.len();
        let (alone, only_one) = (&trio.nodes[asked], |members: &[(String, u64, bool)]| {
            members.iter().filter(|(.., votes)| *votes).count() == 1
        });
        let rest = wait_for("the others to go on without it", || {
            let now = known(alone)?;
            Ok((now.len() == count && only_one(&now)).then_some(now))
        });
        let rest = rest.unwrap_or_else(|error| panic!("{error:#}{}", trio.logs()));
        let gone = &mut trio.nodes[goes];
        let code = wait_for("the end of the one that is gone", || gone.exit_code()).unwrap();
        assert_eq!(code, 1, "{}", gone.log());
        let voter = rest.iter().find(|(.., votes)| *votes).unwrap();
        goes = all.iter().position(|name| *name == voter.0).unwrap();
    }
    let found = trio.exoctl_ok(left[0], &["get", "namespace", "kept", "-o", "name"]).unwrap();
    assert!(found.contains("kept"), "{found}");
}
