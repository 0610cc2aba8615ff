//! Control planes whose disks take long to write through: slower, and no less reliable.
#![cfg(target_os = "linux")]

use std::{path::Path, process::Command};

use exo_tests::{TRIES, Trio, in_the_end};

/// Longer than a vote may take on a disk that is not known to be slow.
const SYNC_MS: &str = "500";
const WRITES: usize = 10;

fn build(out: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("e2e/slow_disk.c");
    let args = ["-shared", "-fPIC", "-o"];
    let status = Command::new("cc").args(args).arg(out).arg(source).arg("-ldl").status();
    assert!(status.unwrap().success(), "cc");
}

#[test]
fn disks_that_are_slow_still_elect_one_leader_and_keep_it() {
    let dir = tempfile::tempdir().unwrap();
    let library = dir.path().join("slow.so");
    build(&library);
    let library = library.to_str().unwrap();
    let env = [("LD_PRELOAD", library), ("EXO_TEST_SYNC_MS", SYNC_MS)];
    let mut trio = Trio::start_with(&["--no-agent"], &env).unwrap();
    let leader = trio.leader().unwrap();
    let log = trio.nodes[leader].log();
    assert!(log.contains("the disk is slow: a new leader will take longer"), "{log}");
    let changes = || -> Vec<usize> {
        trio.nodes.iter().map(|node| node.log().matches("the store's leader").count()).collect()
    };
    // Nothing here is a reason for an election, but a machine that stands still is one. And who
    // joined late may tell only now who leads.
    let mut written = 0;
    let is_kept = (0..TRIES).any(|_| {
        let before = changes();
        for _ in 0..WRITES {
            written += 1;
            let label = format!("n{written}=yes");
            trio.exoctl_ok(0, &["label", "namespace", "default", &label]).unwrap();
        }
        changes() == before
    });
    assert!(is_kept, "no leader lasts{}", trio.logs());
    assert!(changes().iter().any(|count| *count > 0), "nobody tells who leads{}", trio.logs());

    let leader = trio.leader().unwrap();
    trio.nodes[leader].kill().unwrap();
    let left: Vec<usize> = (0..3).filter(|at| *at != leader).collect();
    let new = trio.leader_among(&left).unwrap();
    let labels = in_the_end("a write", || {
        trio.exoctl_ok(new, &["label", "namespace", "default", "last=yes"])?;
        let labels = ["get", "namespace", "default", "-o", "jsonpath={.metadata.labels}"];
        trio.exoctl_ok(new, &labels)
    });
    let labels = labels.unwrap_or_else(|error| panic!("{error:#}{}", trio.logs()));
    for number in 1..=written {
        assert!(labels.contains(&format!("\"n{number}\":\"yes\"")), "{labels}");
    }
}
