//! Asking questions through the OpenAI API.

use std::{
    io::{BufRead as _, BufReader},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use exo_tests::{Cluster, TRIES, in_the_end, metric, python, root, wait_for};
use serde_json::{Value, json};

use crate::failures::counting_at;

fn http() -> reqwest::Client {
    exo_trust::install_crypto();
    reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(300)).build().unwrap()
}

#[test]
fn two_shards_answer_the_official_openai_client() {
    let cluster = Cluster::start().unwrap();
    cluster.apply_tiny().unwrap();
    let shards = cluster.wait_for_shards(2).unwrap();
    let layers: Vec<_> = shards.iter().map(|s| s["spec"]["layers"].as_str().unwrap()).collect();
    assert_ne!(shards[0]["spec"]["node"], shards[1]["spec"]["node"]);
    assert!(layers[0].starts_with("0-") && layers[1].ends_with("-7"), "{layers:?}");

    let output = Command::new(python().unwrap())
        .arg(root().join("tests/e2e/openai_client.py"))
        .args(["--base-url", cluster.first.gateway().unwrap()])
        .arg("--questions")
        .arg(root().join("tests/tiny-model/questions.json"))
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
        cluster.logs()
    );

    unknown_models_are_not_found(&cluster);
    a_client_that_goes_away_stops_its_generation(&cluster);
    kubectl_shows_the_shards(&cluster);
}

/// Both ranks hold a part of every layer; together they say what the model says.
#[test]
fn a_tensor_parallel_instance_answers() {
    let cluster = Cluster::start().unwrap();
    let sample = std::fs::read_to_string(root().join("manifests/samples/tiny.yaml")).unwrap();
    let tensor = sample.replace("  nodes:\n    min: 2", "  sharding: Tensor\n  nodes:\n    min: 2");
    assert_ne!(tensor, sample);
    let applied = cluster.apply(&tensor, true).unwrap();
    assert!(
        applied.status.success(),
        "{}{}",
        String::from_utf8_lossy(&applied.stderr),
        cluster.logs()
    );
    for shard in cluster.shards().unwrap() {
        assert_eq!(
            (&shard["spec"]["sharding"], &shard["spec"]["layers"]),
            (&json!("Tensor"), &json!("0-7"))
        );
        assert_eq!(shard["spec"]["worldSize"], 2);
    }

    let questions = std::fs::read(root().join("tests/tiny-model/questions.json")).unwrap();
    let questions: Vec<Value> = serde_json::from_slice(&questions).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let url = format!("{}/chat/completions", cluster.first.gateway().unwrap());
    for question in questions.iter().filter(|q| q.get("tools").is_none()).step_by(12).take(8) {
        let body = json!({"model": "tiny", "temperature": 0, "messages": question["messages"]});
        let ask = async || {
            let answer = http().post(&url).json(&body).send().await?;
            Ok(answer.error_for_status()?.json::<Value>().await?)
        };
        let answer = in_the_end("an answer", || runtime.block_on(ask())).unwrap();
        let text = &answer["choices"][0]["message"]["content"];
        assert_eq!(text, &question["answer"], "{}", question["id"]);
    }

    // Three nodes would have to share eight heads.
    let three = tensor.replace("min: 2", "min: 3");
    let refused = cluster.apply(&three, false).unwrap();
    assert!(refused.status.success());
    wait_for("the instance to say what it lacks", || {
        let shown = cluster.exoctl_ok(&["describe", "instance", "tiny"])?;
        Ok(shown.contains("3 node(s) wanted, 2 usable").then_some(()))
    })
    .unwrap();
}

fn unknown_models_are_not_found(cluster: &Cluster) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let url = format!("{}/chat/completions", cluster.first.gateway().unwrap());
    let body = json!({"model": "nope", "messages": [{"role": "user", "content": "Hi"}]});
    let (status, answer) = runtime.block_on(async {
        let response = http().post(url).json(&body).send().await.unwrap();
        (response.status().as_u16(), response.json::<Value>().await.unwrap())
    });
    assert_eq!(status, 404);
    assert_eq!(answer["error"]["code"], "model_not_found", "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("nope"), "{answer}");
}

/// curl reads the first words of a long answer and is killed; the runner stops soon after.
fn a_client_that_goes_away_stops_its_generation(cluster: &Cluster) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let runner = || runner_metrics(&runtime, cluster);
    let tokens = || {
        let text = in_the_end("the runner's metrics", runner).unwrap();
        metric(&text, "exo_runner_tokens_total", &["kind=\"completion\""])
    };
    let gone = || {
        let text = cluster.gateway_metrics().unwrap();
        metric(&text, "exo_gateway_requests_total", &["code=\"499\""])
    };
    let ask = || counting_at(cluster.first.gateway().unwrap()).spawn().unwrap();
    let before = tokens();
    let whole = ask().wait_with_output().unwrap();
    assert!(String::from_utf8_lossy(&whole.stdout).contains("[DONE]"));
    let undisturbed = tokens() - before;
    assert!(undisturbed > 50.0, "a long answer has {undisturbed} tokens");

    let is_stopped = (0..TRIES).any(|_| {
        let (before, gone_before) = (tokens(), gone());
        let mut curl = ask();
        let mut first = String::new();
        BufReader::new(curl.stdout.take().unwrap()).read_line(&mut first).unwrap();
        assert!(first.starts_with("data: {"), "{first}");
        curl.kill().unwrap();
        curl.wait().unwrap();
        wait_for("the request to leave the gateway", || {
            let text = cluster.gateway_metrics()?;
            Ok((metric(&text, "exo_gateway_in_flight", &[]) == 0.0).then_some(()))
        })
        .unwrap();
        wait_for("the runner to drop the sequence", || {
            let active = metric(&runner()?, "exo_runner_active_sequences", &[]);
            Ok((active == 0.0).then_some(()))
        })
        .unwrap();
        let (disturbed, counted) = (tokens() - before, gone() - gone_before);
        eprintln!("{disturbed} of {undisturbed} tokens were made, {counted} client went away");
        // A runner that was replaced counts anew.
        (0.0..undisturbed / 2.0).contains(&disturbed) && counted == 1.0
    });
    assert!(is_stopped, "a client's leaving is counted, and ends its answer");
}

/// What rank 0's runner says at `/metrics`, asked with the node's own certificate.
fn runner_metrics(runtime: &tokio::runtime::Runtime, cluster: &Cluster) -> anyhow::Result<String> {
    let rank_0 = cluster.shards()?.into_iter().find(|s| s["spec"]["rank"] == 0);
    let rank_0 = rank_0.context("there is a rank 0")?;
    let serve = rank_0["status"]["listen"]["serve"].as_str().context("rank 0 serves")?.to_owned();
    let tls = exo_trust::TlsPaths::in_dir(&cluster.first.data_dir.join("pki"));
    let client = exo_trust::reqwest_client(&tls)?;
    let text = runtime.block_on(async {
        client.get(format!("https://{serve}/metrics")).send().await?.text().await
    })?;
    exo_test_support::metrics::check(&text);
    Ok(text)
}

fn kubectl_shows_the_shards(cluster: &Cluster) {
    let ask = |args: &[&str]| {
        let mut command = Command::new("kubectl");
        let home = cluster.path().join("kubectl-cache");
        command.arg("--kubeconfig").arg(cluster.kubeconfig()).args(args).env("HOME", home);
        command.output()
    };
    if let Err(error) = ask(&["version", "--client"]) {
        assert!(std::env::var_os("CI").is_none(), "kubectl is missing in CI: {error}");
        eprintln!("kubectl is not installed; its part of this test did not run");
        return;
    }
    let without_age = |text: &str| -> Vec<String> {
        let cut = |l: &str| l.split_whitespace().take(10).collect::<Vec<_>>().join(" ");
        text.lines().map(cut).collect()
    };
    // Between two looks, a status may change.
    in_the_end("the same table of kubectl and exoctl", || {
        let output = ask(&["get", "shards"])?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout)?;
        let rows: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
        let header = "NAME INSTANCE RANK NODE LAYERS SHARDING BACKEND PHASE PROGRESS MEMORY AGE";
        ensure!(rows.len() == 3 && rows[0].join(" ") == header, "{text}");
        let first = &rows[1];
        ensure!(first[0].starts_with("tiny-0-a") && first[0].ends_with("-0"), "{text}");
        ensure!(first[6..9] == ["ring", "Ready", "100%"], "{text}");
        let same = cluster.exoctl_ok(&["get", "shards"])?;
        ensure!(without_age(&same) == without_age(&text), "exoctl: {same}kubectl: {text}");
        Ok(())
    })
    .unwrap();
}
