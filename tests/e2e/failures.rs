//! Killed runners and processes: state survives, requests go on.

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
};

use anyhow::ensure;
use exo_tests::{Cluster, Exo, TRIES, in_the_end, metric, wait_for};
use serde_json::{Value, json};

/// The newest epoch, once all its shards are Ready.
fn ready_epoch(cluster: &Cluster) -> anyhow::Result<Option<u64>> {
    let shards = cluster.shards()?;
    let all_ready = shards.len() == 2 && shards.iter().all(|s| s["status"]["phase"] == "Ready");
    Ok(all_ready.then(|| shards[0]["spec"]["epoch"].as_u64()).flatten())
}

fn wait_for_epoch_after(cluster: &Cluster, old: u64) -> u64 {
    wait_for("a new epoch to be Ready", || Ok(ready_epoch(cluster)?.filter(|epoch| *epoch > old)))
        .unwrap_or_else(|error| panic!("{error:#}{:?}{}", cluster.shards(), cluster.logs()))
}

/// Its one runner, once those of earlier epochs have ended.
fn runner_of(exo: &Exo) -> u32 {
    wait_for("one runner", || {
        let runners = exo.runners()?;
        Ok(runners.first().copied().filter(|_| runners.len() == 1))
    })
    .unwrap()
}

/// One that has ended by itself is as good.
fn kill(pid: u32) {
    Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
}

fn wait_until_gone(runners: &[u32]) {
    for pid in runners {
        wait_for(&format!("runner {pid} to end after its agent"), || {
            let kill = Command::new("kill").args(["-0", &pid.to_string()]).output()?;
            Ok((!kill.status.success()).then_some(()))
        })
        .unwrap();
    }
}

const COUNT: &str = "Count from 1 to 99.";

fn counting(cluster: &Cluster) -> Command {
    counting_at(cluster.first.gateway().unwrap())
}

/// curl, which asks a gateway for a long answer.
pub(crate) fn counting_at(gateway: &str) -> Command {
    let body = json!({
        "model": "tiny", "stream": true, "temperature": 0,
        "messages": [{"role": "user", "content": COUNT}],
    });
    let mut curl = Command::new("curl");
    curl.args(["-sN", "--max-time", "300", "-H", "Content-Type: application/json", "-d"])
        .arg(body.to_string())
        .arg(format!("{gateway}/chat/completions"))
        .stdout(Stdio::piped());
    curl
}

/// The long answer, once the gateway knows of the instance.
pub(crate) fn answer_at(gateway: &str) -> String {
    in_the_end("an answer", || {
        let output = counting_at(gateway).output()?;
        let text = String::from_utf8(output.stdout)?;
        ensure!(text.starts_with("data: "), "{text}");
        Ok(text_of(text.lines().map(|line| Ok(line.to_owned()))))
    })
    .unwrap()
}

/// Text of a whole stream, which must end well exactly once.
pub(crate) fn text_of(lines: impl Iterator<Item = std::io::Result<String>>) -> String {
    let (mut text, mut finishes, mut done) = (String::new(), 0, false);
    for line in lines {
        let line = line.unwrap();
        let Some(data) = line.strip_prefix("data: ") else { continue };
        assert!(!done, "nothing comes after [DONE]");
        if data == "[DONE]" {
            done = true;
            continue;
        }
        let chunk: Value = serde_json::from_str(data).unwrap();
        assert!(chunk.get("error").is_none(), "{chunk}");
        for choice in chunk["choices"].as_array().unwrap() {
            text += choice["delta"]["content"].as_str().unwrap_or_default();
            finishes += usize::from(choice["finish_reason"].is_string());
        }
    }
    assert!(done && finishes == 1, "the stream broke off after {text:?}");
    text
}

#[test]
fn a_killed_runner_is_replaced_and_its_request_goes_on() {
    let cluster = Cluster::start().unwrap();
    cluster.apply_tiny().unwrap();
    let mut epoch = wait_for_epoch_after(&cluster, 0);
    let undisturbed = answer_at(cluster.first.gateway().unwrap());
    assert!(undisturbed.contains("98"), "{undisturbed}");

    let resumes = || metric(&cluster.gateway_metrics().unwrap(), "exo_gateway_resumes_total", &[]);

    // Rank 1's runner dies while an answer is on its way; then rank 0's; each breaks the group.
    for victim in [&cluster.second, &cluster.first] {
        let is_resumed = (0..TRIES).any(|_| {
            let before = resumes();
            let pid = runner_of(victim);
            let mut curl = counting(&cluster).spawn().unwrap();
            let mut lines = BufReader::new(curl.stdout.take().unwrap()).lines();
            let head: Vec<_> = lines.by_ref().take(6).collect();
            kill(pid);
            let text = text_of(head.into_iter().chain(lines));
            curl.wait().unwrap();
            assert_eq!(text, undisturbed, "no token lost, none twice");
            epoch = wait_for_epoch_after(&cluster, epoch);
            resumes() > before
        });
        assert!(is_resumed, "an answer that is under way when a runner dies is resumed");
    }
}

#[test]
fn state_survives_killing_every_process() {
    let mut cluster = Cluster::start().unwrap();
    cluster.apply_tiny().unwrap();
    let epoch = wait_for_epoch_after(&cluster, 0);
    let before = cluster.exoctl_ok(&["get", "models", "-o", "json"]).unwrap();
    let orphans = [&cluster.first, &cluster.second].map(runner_of);

    // Only the first: the second agent stays and finds its way back.
    cluster.first.kill().unwrap();
    cluster.first.restart().unwrap();
    let epoch = wait_for_epoch_after(&cluster, epoch);

    cluster.first.kill().unwrap();
    cluster.second.kill().unwrap();
    cluster.first.restart().unwrap();
    cluster.second.restart().unwrap();
    wait_for_epoch_after(&cluster, epoch);
    let after = cluster.exoctl_ok(&["get", "models", "-o", "json"]).unwrap();
    assert_eq!(before, after);
    wait_until_gone(&orphans);

    // A polite stop ends everything with status 0.
    let runners = cluster.first.runners().unwrap();
    assert_eq!(cluster.second.terminate().unwrap(), Some(0), "{}", cluster.logs());
    assert_eq!(cluster.first.terminate().unwrap(), Some(0), "{}", cluster.logs());
    wait_until_gone(&runners);
}

#[test]
fn a_peer_that_is_down_is_passed_over() {
    // Nothing listens at port 1.
    let mut cluster = Cluster::start_with_peers(|peer| format!("127.0.0.1:1,{peer}")).unwrap();
    cluster.apply_tiny().unwrap();
    let epoch = wait_for_epoch_after(&cluster, 0);
    // With its certificate already there, it looks for a member another way.
    cluster.second.kill().unwrap();
    cluster.second.restart().unwrap();
    wait_for_epoch_after(&cluster, epoch);
    cluster.wait_for_nodes().unwrap();
}

#[test]
fn a_lost_agent_frees_its_shards_for_the_nodes_that_are_left() {
    let mut cluster = Cluster::start().unwrap();
    let set_schedulable = |cluster: &Cluster, node: &str, unschedulable: bool| {
        let text = format!(
            "apiVersion: exo.dev/v1alpha1\nkind: Node\nmetadata: {{name: {node}}}\n\
             spec: {{unschedulable: {unschedulable}}}\n"
        );
        let output = cluster.apply(&text, false).unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    let home = |cluster: &Cluster, wanted: &str| {
        wait_for(&format!("one ready shard on {wanted}"), || {
            let shards = cluster.shards()?;
            let there = shards.len() == 1
                && shards[0]["status"]["phase"] == "Ready"
                && shards[0]["spec"]["node"] == wanted;
            Ok(there.then_some(()))
        })
        .unwrap_or_else(|error| panic!("{error:#}{:?}{}", cluster.shards(), cluster.logs()));
    };
    // Only mac-2 takes new shards; then mac-1 may again, and mac-2 is lost.
    set_schedulable(&cluster, "mac-1", true);
    let sample = std::fs::read_to_string(exo_tests::root().join("manifests/samples/tiny.yaml"));
    let output = cluster.apply(&sample.unwrap().replace("min: 2", "min: 1"), true).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    home(&cluster, "mac-2");
    set_schedulable(&cluster, "mac-1", false);
    home(&cluster, "mac-2");
    cluster.second.kill().unwrap();
    home(&cluster, "mac-1");
}
