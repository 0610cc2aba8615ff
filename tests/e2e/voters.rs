//! Three nodes hold the control plane: any one of them may be lost.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use exo_tests::{Admin, Cluster, Exo, TRIES, Trio, binary, in_the_end, members, root, wait_for};
use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::failures::{answer_at, counting_at, text_of};

const CALL_LIMIT: Duration = Duration::from_secs(10);
/// Pause of a writer that was refused. Without it those who elect would not get the processor.
const REFUSED: Duration = Duration::from_millis(10);

/// Names of the objects that were acknowledged, with the time of the answer.
type Acknowledged = Arc<Mutex<Vec<(String, Instant)>>>;

/// Creates one object after the other until told to stop.
async fn write_until(admin: Admin, writer: usize, stop: Arc<AtomicBool>, done: Acknowledged) {
    for i in 0.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let name = format!("load-{writer}-{i}");
        let body = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
            "metadata": {"name": name}, "spec": {"holderIdentity": name}});
        let answer = admin.client.post(admin.leases()).json(&body).send().await;
        if answer.is_ok_and(|answer| answer.status().is_success()) {
            done.lock().unwrap().push((name, Instant::now()));
        } else {
            tokio::time::sleep(REFUSED).await;
        }
    }
}

async fn lease_names(admin: &Admin) -> anyhow::Result<Vec<String>> {
    let answer = admin.client.get(admin.leases()).send().await?;
    let list: Value = answer.error_for_status()?.json().await?;
    let items = list["items"].as_array().context("a list has items")?;
    Ok(items.iter().filter_map(|l| l["metadata"]["name"].as_str().map(str::to_owned)).collect())
}

fn node(trio: &Trio, through: usize, name: &str) -> anyhow::Result<Value> {
    Ok(serde_json::from_str(&trio.exoctl_ok(through, &["get", "node", name, "-o", "json"])?)?)
}

fn kubectl_works(trio: &Trio, through: usize) {
    let exo = &trio.nodes[through];
    in_the_end("kubectl to list the nodes", || {
        let output = Command::new("kubectl")
            .arg("--kubeconfig")
            .arg(exo.data_dir.join("kubeconfig"))
            .args(["get", "nodes.exo.dev", "-o", "name"])
            .env("HOME", trio.place.dir.join("kubectl-cache"))
            .output();
        let Ok(output) = output else {
            assert!(std::env::var_os("CI").is_none(), "kubectl is missing in CI");
            return Ok(());
        };
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(text.contains("mac-1") && text.contains("mac-3"), "{output:?}");
        Ok(())
    })
    .unwrap();
}

/// Everything that Prometheus would ask.
fn metrics_are_well_formed(runtime: &tokio::runtime::Runtime, trio: &Trio, agent: &Exo) {
    let look = async |client: &reqwest::Client, url: &str, wanted: &[&str]| {
        let answer = client.get(url).send().await?.error_for_status()?;
        let kind = answer.headers()["content-type"].to_str()?.to_owned();
        assert!(kind.starts_with("text/plain; version=0.0.4"), "{url}: {kind}");
        let text = answer.text().await?;
        let types = exo_test_support::metrics::check(&text);
        for name in wanted {
            ensure!(types.contains_key(*name), "{name} is missing in {text}");
        }
        Ok(())
    };
    let ask = |client: &reqwest::Client, url: &str, wanted: &[&str]| {
        in_the_end(url, || runtime.block_on(look(client, url, wanted))).unwrap();
    };
    for exo in &trio.nodes {
        let admin = Admin::of(exo, CALL_LIMIT).unwrap();
        let served = [
            "apiserver_request_duration_seconds",
            "exo_store_bytes",
            "exo_raft_term",
            "exo_raft_has_leader",
            "exo_node_memory_bytes",
        ];
        ask(&admin.client, &format!("{}/metrics", admin.url), &served);
        let plain = reqwest::Client::builder().no_proxy().timeout(CALL_LIMIT).build().unwrap();
        let url = exo.gateway().unwrap().replace("/v1", "/metrics");
        ask(&plain, &url, &["exo_gateway_requests_total", "exo_gateway_in_flight"]);
    }
    let address = wait_for("the agent to serve /metrics", || {
        let log = agent.log();
        let said = log.lines().find(|line| line.contains("serving /metrics"));
        let mut words = said.unwrap_or_default().split_whitespace();
        Ok(words.find_map(|word| word.strip_prefix("address=").map(str::to_owned)))
    });
    let tls = exo_trust::TlsPaths::in_dir(&agent.data_dir.join("pki"));
    let client = exo_trust::reqwest_client(&tls).unwrap();
    let url = format!("https://{}/metrics", address.unwrap());
    ask(&client, &url, &["exo_node_memory_bytes"]);
}

#[test]
fn the_loss_of_the_leader_costs_a_moment_and_nothing_else() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut trio = Trio::start(&[]).unwrap();
    let leader = trio.leader().unwrap();
    let survivors: Vec<usize> = (0..3).filter(|at| *at != leader).collect();
    // It knows the leader alone, and hears of the others from that.
    let peer = trio.nodes[leader].api().unwrap().trim_start_matches("https://").to_owned();
    let agent = ["--no-control-plane", "--peers", &peer];
    let agent = Exo::launch(&trio.place, "mac-4", &agent).unwrap();
    for name in ["mac-1", "mac-2", "mac-3", "mac-4"] {
        trio.exoctl_ok(survivors[0], &["wait", &format!("node/{name}"), "--for=condition=Ready"])
            .unwrap();
    }
    (0..3).for_each(|at| kubectl_works(&trio, at));
    wait_for("the agent to know all members", || {
        let members = fs::read_to_string(trio.place.dir.join("mac-4/members")).unwrap_or_default();
        Ok((members.lines().count() == 3).then_some(()))
    })
    .unwrap();

    // Served through every node, whichever the shards are on.
    let sample = root().join("manifests/samples/tiny.yaml");
    let sample = sample.to_str().unwrap();
    trio.exoctl_ok(survivors[0], &["apply", "-f", sample, "--wait", "--timeout", "5m"]).unwrap();
    let answers: Vec<String> =
        trio.nodes.iter().map(|exo| answer_at(exo.gateway().unwrap())).collect();
    assert!(answers[0].contains("98") && answers.iter().all(|a| *a == answers[0]), "{answers:?}");
    metrics_are_well_formed(&runtime, &trio, &agent);

    // Writes and a stream are under way when the leader is killed.
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Acknowledged::default());
    let writers: Vec<_> = survivors
        .iter()
        .map(|at| {
            let admin = Admin::of(&trio.nodes[*at], CALL_LIMIT).unwrap();
            let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
            runtime.spawn(write_until(admin, *at, stop, done))
        })
        .collect();
    let count = || done.lock().unwrap().len();
    wait_for("writes", || Ok((count() > 50).then_some(()))).unwrap();
    let mut curl = counting_at(trio.nodes[survivors[0]].gateway().unwrap()).spawn().unwrap();
    let mut lines = BufReader::new(curl.stdout.take().unwrap()).lines();
    let head: Vec<_> = lines.by_ref().take(4).collect();
    let killed = Instant::now();
    trio.nodes[leader].kill().unwrap();
    let gap = wait_for("the next acknowledged write", || {
        let done = done.lock().unwrap();
        // What was on its way may still be answered in the first moment.
        let after = |at: &Instant| at.duration_since(killed) > Duration::from_millis(50);
        let times = done.iter().map(|(_, at)| at);
        Ok(times.filter(|at| **at > killed && after(at)).min().map(|at| at.duration_since(killed)))
    })
    .unwrap_or_else(|error| panic!("{error:#}{}", trio.logs()));
    eprintln!("next acknowledged write {gap:.0?} after the leader's death");
    let before = count();
    wait_for("more writes", || Ok((count() > before + 50).then_some(()))).unwrap();
    let text = text_of(head.into_iter().chain(lines));
    curl.wait().unwrap();
    assert_eq!(text, answers[0], "no token lost, none twice");
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        runtime.block_on(writer).unwrap();
    }

    // The agent has found another API server.
    let beat = |trio: &Trio| -> anyhow::Result<String> {
        Ok(node(trio, survivors[0], "mac-4")?["status"]["lastHeartbeatTime"].to_string())
    };
    let last = beat(&trio).unwrap();
    wait_for("a heartbeat of the agent", || Ok((beat(&trio)? != last).then_some(()))).unwrap();

    trio.nodes[leader].restart().unwrap();
    trio.wait_for_voters(leader, 3).unwrap();
    let acknowledged = done.lock().unwrap().clone();
    for at in 0..3 {
        let admin = Admin::of(&trio.nodes[at], CALL_LIMIT).unwrap();
        let found = in_the_end("the leases", || runtime.block_on(lease_names(&admin))).unwrap();
        let lost: Vec<_> = acknowledged.iter().filter(|(name, _)| !found.contains(name)).collect();
        assert!(lost.is_empty(), "{} of {} lost: {lost:?}", lost.len(), acknowledged.len());
        kubectl_works(&trio, at);
    }
}

#[test]
fn a_lost_member_goes_with_its_node_and_another_takes_its_place() {
    let mut trio = Trio::start(&[]).unwrap();
    let leader = trio.leader().unwrap();
    let lost = if leader == 2 { 1 } else { 2 };
    let name = trio.nodes[lost].name.clone();
    trio.exoctl_ok(leader, &["wait", &format!("node/{name}"), "--for=condition=Ready"]).unwrap();
    wait_for("its Node to be held", || {
        let node = node(&trio, leader, &name)?;
        Ok(node["metadata"]["finalizers"].to_string().contains("control-plane").then_some(()))
    })
    .unwrap();
    trio.nodes[lost].kill().unwrap();
    trio.exoctl_ok(leader, &["delete", "node", &name]).unwrap();
    // How many voters are left is no matter of this test: of two, one is enough.
    wait_for("the lost one to be no member", || {
        let answer = members(&trio.nodes[leader])?;
        let members = answer["members"].as_array().context("a list of members")?;
        Ok(members.iter().all(|member| member["name"] != *name).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error:#}{}", trio.logs()));

    let peer = trio.nodes[leader].api().unwrap().trim_start_matches("https://").to_owned();
    let args = ["--port", "0", "--api-port", "0", "--peers", &peer];
    let fourth = Exo::start(&trio.place, "mac-4", &args).unwrap();
    trio.nodes.push(fourth);
    trio.wait_for_voters(3, 3).unwrap();

    // The lost one comes back, and is told.
    drop(trio.nodes[lost].restart());
    let code = wait_for("the end of the node that was taken out", || trio.nodes[lost].exit_code());
    assert_eq!(code.unwrap(), 1, "{}", trio.logs());
    let log = trio.nodes[lost].log();
    assert!(log.contains("was taken out of the cluster"), "{log}");
    trio.exoctl_ok(leader, &["get", "nodes"]).unwrap();

    // It does what it was told, and is no danger to who has the name that it takes.
    let data_dir = trio.nodes[lost].data_dir.clone();
    fs::remove_dir_all(data_dir.join("raft")).unwrap();
    let taken = "a node named `mac-4` is already there";
    refused(&data_dir, &["--name", "mac-4", "--peers", &peer], taken);
    let live = trio.nodes[3].api().unwrap().trim_start_matches("https://").to_owned();
    replace_by_its_own_word(&data_dir, [&peer, &live], taken);
    let args = ["--port", "0", "--api-port", "0", "--peers", &peer];
    trio.nodes[lost] = Exo::start(&trio.place, &name, &args).unwrap();
    // Who was taken out would not hear of the new one.
    for at in [leader, 3] {
        wait_for("four members again", || {
            let members = members(&trio.nodes[at])?;
            Ok((members["members"].as_array().map(Vec::len) == Some(4)).then_some(()))
        })
        .unwrap_or_else(|error| panic!("{error:#}{}", trio.logs()));
    }
    assert_eq!(trio.nodes[3].exit_code().unwrap(), None);
}

/// Who has the authority's key can name itself as it likes.
fn replace_by_its_own_word(data_dir: &std::path::Path, [peer, live]: [&str; 2], refusal: &str) {
    let pki = data_dir.join("pki");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let authority = exo_trust::Authority::open_or_create(&pki, now.as_secs()).unwrap();
    let groups = [exo_trust::GROUP_NODES, exo_trust::GROUP_CONTROL_PLANE];
    let subject = exo_trust::Subject {
        name: "system:node:mac-4".to_owned(),
        groups: groups.map(str::to_owned).to_vec(),
    };
    let issued = authority.issue(&subject, Some(&[]), now.as_secs()).unwrap();
    let forged = tempfile::tempdir().unwrap();
    let paths = exo_trust::TlsPaths::in_dir(forged.path());
    fs::write(&paths.ca, authority.certificate_pem()).unwrap();
    fs::write(&paths.cert, issued.certificate_pem).unwrap();
    fs::write(&paths.key, issued.key_pem).unwrap();
    let client = exo_trust::reqwest_client(&paths).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for address in ["127.0.0.1:1", live] {
        let new = json!({"id": 7, "address": address});
        let url = format!("https://{peer}/exo/v1/control-plane/members");
        let ask = async || {
            let answer = client.post(&url).json(&new).send().await?;
            let (status, text) = (answer.status(), answer.text().await?);
            // It can't find out now who is there, or who leads.
            ensure!(status != StatusCode::SERVICE_UNAVAILABLE, "{text}");
            Ok(text)
        };
        let text = in_the_end("a refusal", || runtime.block_on(ask())).unwrap();
        assert!(text.contains(refusal), "{address}: {text}");
    }
}

fn refused(data_dir: &std::path::Path, args: &[&str], needle: &str) {
    let text = refusal(data_dir, args);
    assert!(text.contains(needle), "{args:?}: {text}");
}

/// What an `exo` says that ends by itself.
fn refusal(data_dir: &std::path::Path, args: &[&str]) -> String {
    let said = tempfile::NamedTempFile::new().unwrap();
    let mut child = Command::new(binary("exo").unwrap())
        .args(["--listen", "127.0.0.1", "--port", "0", "--data-dir"])
        .arg(data_dir)
        .args(args)
        .args(if args.contains(&"--api-port") { &[][..] } else { &["--api-port", "0"] })
        .stdout(Stdio::null())
        .stderr(said.reopen().unwrap())
        .spawn()
        .unwrap();
    let ended = wait_for("the end of what can't work", || Ok(child.try_wait()?));
    // Where it has ended there is nothing to kill.
    let _ = child.kill();
    child.wait().unwrap();
    let text = fs::read_to_string(said.path()).unwrap();
    let status = ended.unwrap_or_else(|error| panic!("{args:?}: {error:#}: {text}"));
    assert_eq!(status.code(), Some(1), "{args:?}: {text}");
    text
}

/// A port of this machine that nobody has at the moment.
fn free_port() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port().to_string()
}

#[test]
fn what_cannot_work_is_refused_with_a_way_out() {
    let mut cluster = Cluster::start().unwrap();
    let other = Cluster::start().unwrap();
    let peer = other.first.api().unwrap().trim_start_matches("https://").to_owned();
    cluster.second.kill().unwrap();
    cluster.first.kill().unwrap();
    let (plane, agent) = (&cluster.first.data_dir, &cluster.second.data_dir);
    refused(agent, &["--name", "mac-2"], "runs models only");
    let both = ["--name", "mac-1", "--no-control-plane", "--peers", &peer];
    refused(plane, &both, "holds a part of a cluster's control plane");
    refused(plane, &["--name", "mac-1", "--peers", &peer], "belongs to another cluster");
    let new = cluster.path().join("new");
    let wrong = ["--name", "mac-9", "--cluster", "office", "--peers", &peer];
    refused(&new, &wrong, "this is cluster `exo`, not `office`");
    // A name is taken while its node is heard of.
    other.wait_for_nodes().unwrap();
    refused(&new, &["--name", "mac-1", "--peers", &peer], "choose another --name");
    let gone = "if that node is gone for good, `exoctl delete node mac-2` first";
    refused(&new, &["--name", "mac-2", "--peers", &peer], gone);
    let down = cluster.first.api().unwrap().trim_start_matches("https://").to_owned();
    refused(&new, &["--name", "mac-9", "--peers", &down], "refused the connection: is exo running");
    let alone = || {
        let port = free_port();
        let itself = format!("127.0.0.1:{port}");
        refusal(&new, &["--name", "mac-9", "--api-port", &port, "--peers", &itself])
    };
    // Somebody else may have got the port by then.
    let text = (0..TRIES).map(|_| alone()).find(|text| !text.contains("in use")).unwrap();
    assert!(text.contains("names this node itself only"), "{text}");
}
