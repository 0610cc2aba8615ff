//! A disk without room, as clients of the API meet it.

use std::{fs, process::Command, time::Duration};

use anyhow::ensure;
use exo_test_support::{Volume, fill};
use exo_tests::{Admin, Exo, Place, binary, in_the_end, root};
use reqwest::StatusCode;
use serde_json::{Value, json};

fn instance(name: &str) -> Value {
    json!({"apiVersion": "exo.dev/v1alpha1", "kind": "InferenceInstance",
        "metadata": {"name": name}, "spec": {"model": "tiny"}})
}

#[test]
fn a_full_disk_is_told_to_clients_and_passes() {
    let Some(volume) = Volume::mount("size=220m") else {
        return eprintln!("nothing can be mounted here: this test did not run");
    };
    let place = Place::loopback(volume.path(), &root().join("manifests/models"));
    let mut exo =
        Exo::start(&place, "mac-1", &["--port", "0", "--api-port", "0", "--no-agent"]).unwrap();
    let admin = Admin::of(&exo, Duration::from_secs(30)).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let instances =
        format!("{}/apis/exo.dev/v1alpha1/namespaces/default/inferenceinstances", admin.url);
    let create = |name: &str| {
        runtime.block_on(async {
            let answer = admin.client.post(&instances).json(&instance(name)).send().await?;
            let retry = answer.headers().contains_key("retry-after");
            anyhow::Ok((answer.status(), retry, answer.json::<Value>().await?))
        })
    };
    // A try whose end is unknown may have made it.
    let create_in_the_end = |name: &str| {
        in_the_end("a write", || {
            let (code, _, body) = create(name)?;
            ensure!(matches!(code, StatusCode::CREATED | StatusCode::CONFLICT), "{body}");
            Ok(())
        })
    };
    let refused = |name: &str| {
        in_the_end("a refusal", || {
            let answer = create(name)?;
            // Who leads is not known yet.
            ensure!(answer.0 != StatusCode::SERVICE_UNAVAILABLE, "{}", answer.2);
            Ok(answer)
        })
        .unwrap()
    };
    create_in_the_end("before").unwrap();

    let ballast = volume.path().join("ballast");
    fill(&ballast, 110 << 20);
    let (code, retry, body) = refused("meanwhile");
    assert_eq!((code, retry), (StatusCode::INSUFFICIENT_STORAGE, false), "{body}");
    assert_eq!(body["reason"], "InsufficientStorage");
    assert!(body["message"].as_str().unwrap().contains("the disk is full"), "{body}");
    let exoctl = |args: &[&str]| {
        let mut command = Command::new(binary("exoctl").unwrap());
        let kubeconfig = exo.data_dir.join("kubeconfig");
        command.arg("--kubeconfig").arg(kubeconfig).args(args).output().unwrap()
    };
    let full = exoctl(&["scale", "instance", "before", "--replicas", "2"]);
    let said = String::from_utf8_lossy(&full.stderr).into_owned();
    assert!(!full.status.success() && said.contains("the disk is full"), "{said}");
    let listed = exoctl(&["get", "instances", "-o", "name"]);
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert_eq!(listed, "inferenceinstance.exo.dev/before\n", "reads go on");

    // It may even end and begin without room.
    exo.kill().unwrap();
    exo.restart().unwrap();
    assert_eq!(refused("meanwhile").0, StatusCode::INSUFFICIENT_STORAGE);
    fs::remove_file(&ballast).unwrap();
    create_in_the_end("after").unwrap_or_else(|error| panic!("{error:#}{}", exo.log_tail()));
    let list = async || {
        let answer = admin.client.get(&instances).send().await?;
        Ok(answer.error_for_status()?.json::<Value>().await?)
    };
    let listed = in_the_end("the list", || runtime.block_on(list())).unwrap();
    let names: Vec<_> =
        listed["items"].as_array().unwrap().iter().map(|i| &i["metadata"]["name"]).collect();
    assert_eq!(names, ["after", "before"]);
}
