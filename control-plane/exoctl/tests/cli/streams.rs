//! What scripts can't show: output while a command runs, servers that aren't there.

use std::process::Stdio;

use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};

use crate::cluster::{Cluster, PATIENCE};

/// The next line, without the age at its end.
async fn next_row(lines: &mut tokio::io::Lines<impl tokio::io::AsyncBufRead + Unpin>) -> String {
    let line = tokio::time::timeout(PATIENCE, lines.next_line()).await.expect("a line comes");
    let line = line.unwrap().expect("the command goes on");
    let words: Vec<&str> = line.split_whitespace().collect();
    words[..words.len() - 1].join(" ")
}

#[tokio::test]
async fn watching_prints_rows_as_they_change() {
    let cluster = Cluster::start().await;
    cluster.create_shard(0, "0-39").await;
    let mut command = cluster.command(&["get", "shards", "-w"]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(
        next_row(&mut lines).await,
        "NAME INSTANCE RANK NODE LAYERS SHARDING BACKEND PHASE PROGRESS MEMORY"
    );
    let ready = |rank: u32, layers: &str| {
        let node = rank + 1;
        format!(
            "llama-0-a1-{rank} llama {rank} studio-{node} {layers} Pipeline jaccl Ready 100% 19Gi"
        )
    };
    assert_eq!(next_row(&mut lines).await, ready(0, "0-39"));
    cluster.create_shard(1, "40-79").await;
    // As it was created, then with its status.
    let created = next_row(&mut lines).await;
    assert!(created.starts_with("llama-0-a1-1 llama 1 studio-2"), "{created}");
    assert_eq!(next_row(&mut lines).await, ready(1, "40-79"));
    child.kill().await.unwrap();
}

#[tokio::test]
async fn a_reader_that_leaves_is_no_failure() {
    let cluster = Cluster::start().await;
    cluster.create_shards().await;
    let mut command = cluster.command(&["get", "shards", "-w", "-o", "name"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(lines.next_line().await.unwrap().unwrap(), "shard.exo.dev/llama-0-a1-0");
    drop(lines);
    cluster.create_shard(2, "80-81").await;
    let output = tokio::time::timeout(PATIENCE, child.wait_with_output()).await.unwrap().unwrap();
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
    assert!(output.status.success());
}

#[tokio::test]
async fn a_server_that_is_not_there_is_named() {
    let cluster = Cluster::start().await;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let text = std::fs::read_to_string(cluster.kubeconfig()).unwrap();
    let server = text.split('\'').nth(1).unwrap();
    std::fs::write(cluster.kubeconfig(), text.replace(server, &format!("http://{address}")))
        .unwrap();
    let output = cluster.run(&["get", "nodes"]).await;
    assert_eq!(output.code, 1);
    let expect = format!("error: can't reach the API server at http://{address}");
    assert!(output.stderr.starts_with(&expect), "{}", output.stderr);
    assert_eq!(output.stderr.lines().count(), 1);
}

#[tokio::test]
async fn what_one_server_can_not_do_now_another_one_does() {
    let cluster = Cluster::start().await;
    let status = serde_json::json!({"kind": "Status", "apiVersion": "v1", "status": "Failure",
        "message": "no majority", "reason": "ServiceUnavailable", "code": 503});
    let refuse = move || async move { (http::StatusCode::SERVICE_UNAVAILABLE, axum::Json(status)) };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let minority = listener.local_addr().unwrap().to_string();
    let router = axum::Router::new().fallback(refuse);
    let serving = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    let text = std::fs::read_to_string(cluster.kubeconfig()).unwrap();
    let server = text.split('\'').nth(1).unwrap();
    let other = server.trim_start_matches("http://");
    let with_other = format!(
        "'http://{minority}', \
         extensions: [{{name: exo.dev/servers, extension: {{servers: ['{other}']}}}}]"
    );
    std::fs::write(cluster.kubeconfig(), text.replace(&format!("'{server}'"), &with_other))
        .unwrap();
    let instance = "{apiVersion: exo.dev/v1alpha1, kind: InferenceInstance, \
                    metadata: {name: chat}, spec: {model: tiny}}";
    let applied = cluster.run_with_input(&["apply", "-f", "-"], instance).await;
    assert_eq!(applied.stdout, "inferenceinstance.exo.dev/chat created\n", "{}", applied.stderr);
    assert_eq!(applied.stderr, format!("{minority} can't do this now: asking {other}\n"));
    // Alone, it says itself what it lacks.
    let alone = with_other.replace(other, &minority);
    std::fs::write(cluster.kubeconfig(), text.replace(&format!("'{server}'"), &alone)).unwrap();
    let got = cluster.run(&["get", "instances"]).await;
    assert_eq!(got.code, 1);
    assert!(got.stderr.starts_with("error: no majority"), "{}", got.stderr);
    serving.abort();
}

#[tokio::test]
async fn without_a_configuration_it_says_where_it_looked() {
    let cluster = Cluster::start().await;
    std::fs::remove_file(cluster.kubeconfig()).unwrap();
    let output = cluster.run(&["get", "nodes"]).await;
    assert_eq!(output.code, 1);
    let place = cluster.kubeconfig().display().to_string();
    assert!(output.stderr.contains(&place), "{}", output.stderr);
    // An explicit one that is missing is named as well.
    let output = cluster.run(&["get", "nodes", "--kubeconfig", "nowhere"]).await;
    assert_eq!(output.code, 1);
    assert!(output.stderr.contains("nowhere"), "{}", output.stderr);
}

#[tokio::test]
async fn wait_sees_what_happens_later() {
    let cluster = Cluster::start().await;
    let instance = "{apiVersion: exo.dev/v1alpha1, kind: InferenceInstance, \
                    metadata: {name: chat}, spec: {model: tiny}}";
    let args = ["wait", "instance/chat", "--for=condition=Ready"];
    let waiting = cluster.run(&args);
    let happening = async {
        let applied = cluster.run_with_input(&["apply", "-f", "-"], instance).await;
        assert_eq!(applied.code, 0, "{}", applied.stderr);
        cluster.set_ready("chat", false).await;
        cluster.set_ready("chat", true).await;
    };
    let (waited, ()) = tokio::join!(waiting, happening);
    assert_eq!(waited.code, 0, "{}", waited.stderr);
    assert_eq!(waited.stdout, "inferenceinstance.exo.dev/chat condition met\n");
}

#[tokio::test]
async fn a_field_that_only_the_server_knows_is_the_servers_business() {
    let mut crds = serde_json::to_value(exo_crds::all()).unwrap();
    let crd = crds
        .as_array_mut()
        .unwrap()
        .iter_mut()
        .find(|crd| crd["spec"]["names"]["kind"] == "InferenceInstance");
    let schema = &mut crd.unwrap()["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    schema["properties"]["spec"]["properties"]["priority"] = serde_json::json!({"type": "integer"});
    let cluster = Cluster::start_with(&serde_json::from_value::<Vec<_>>(crds).unwrap()).await;
    let newer = |priority: &str| {
        format!(
            "{{apiVersion: exo.dev/v1alpha1, kind: InferenceInstance, metadata: {{name: chat}}, \
             spec: {{model: tiny, priority: {priority}}}}}"
        )
    };
    let apply = ["apply", "-f", "-"];
    let refused = cluster.run_with_input(&apply, &newer("high")).await;
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("spec.priority"), "{}", refused.stderr);
    let applied = cluster.run_with_input(&apply, &newer("3")).await;
    assert_eq!(applied.stdout, "inferenceinstance.exo.dev/chat created\n", "{}", applied.stderr);
    let got = cluster.run(&["get", "instance", "chat", "-o", "json"]).await;
    assert!(got.stdout.contains("\"priority\": 3"), "{}", got.stdout);
    // Alone, this exoctl can't know it.
    let alone =
        cluster.run_with_input(&["apply", "-f", "-", "--dry-run=client"], &newer("3")).await;
    assert_eq!(alone.code, 1);
    assert!(alone.stderr.contains("spec.priority: unknown field"), "{}", alone.stderr);
}

#[tokio::test]
async fn a_client_dry_run_needs_no_server() {
    let cluster = Cluster::start().await;
    std::fs::remove_file(cluster.kubeconfig()).unwrap();
    let instance = "{apiVersion: exo.dev/v1alpha1, kind: InferenceInstance, \
                    metadata: {name: chat}, spec: {model: tiny}}";
    let checked = cluster.run_with_input(&["apply", "-f", "-", "--dry-run=client"], instance).await;
    assert_eq!(checked.code, 0, "{}", checked.stderr);
    assert_eq!(checked.stdout, "inferenceinstance.exo.dev/chat valid (client dry run)\n");
}

#[tokio::test]
async fn waiting_ends_when_a_failure_for_good_comes_to_light() {
    let cluster = Cluster::start().await;
    let instance = "{apiVersion: exo.dev/v1alpha1, kind: InferenceInstance, \
                    metadata: {name: chat}, spec: {model: tiny}}";
    let mut command = cluster.command(&["apply", "-f", "-", "--wait"]);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(instance.as_bytes()).await.unwrap();
    drop(stdin);
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut next = async || {
        let line = tokio::time::timeout(PATIENCE, lines.next_line()).await.expect("a line comes");
        line.unwrap().expect("the command goes on")
    };
    assert_eq!(next().await, "chat: Ready is not known yet");
    cluster.set_starting("chat").await;
    assert_eq!(next().await, "chat: Starting, rank 0 Loading on mac-1, rank 1 Downloaded on mac-2");
    cluster.fail("chat", false).await;
    assert_eq!(next().await, "chat: ShardFailed: shard chat-0-a3-0: PeerLost; next try soon");
    cluster.fail("chat", true).await;
    assert_eq!(
        next().await,
        "error: inferenceinstance.exo.dev/chat will not become Ready: shard chat-0-a3-1 on mac-2: \
         BadWeights: no tensor `lm_head.weight`"
    );
    let ended = tokio::time::timeout(PATIENCE, child.wait()).await.unwrap().unwrap();
    assert_eq!(ended.code(), Some(1));
}
