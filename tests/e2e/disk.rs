//! A disk without room, as clients of the API meet it.

use std::{
    fs::{self, File},
    io::Write as _,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::ensure;
use exo_test_support::{Volume, fill};
use exo_tests::{Admin, Exo, Place, Trio, binary, in_the_end, root, wait_for};
use reqwest::StatusCode;
use serde_json::{Value, json};

fn instance(name: &str) -> Value {
    json!({"apiVersion": "exo.dev/v1alpha1", "kind": "InferenceInstance",
        "metadata": {"name": name}, "spec": {"model": "tiny"}})
}

/// Leaves no room at all.
fn fill_up(path: &Path) {
    let mut file = File::create(path).unwrap();
    let mut piece = vec![1; 1 << 20];
    while !piece.is_empty() {
        while file.write_all(&piece).is_ok() {}
        piece.truncate(piece.len() / 2);
    }
}

/// Whoever leads.
#[test]
fn one_full_disk_of_three_stops_nobody() {
    let Some(volume) = Volume::mount("size=220m") else {
        return eprintln!("nothing can be mounted here: this test did not run");
    };
    let first = volume.path().to_owned();
    let trio = Trio::start_at(&["--no-agent"], |place, host| match host {
        0 => Place { dir: first.clone(), ..place },
        _ => place,
    })
    .unwrap();
    let create = |through: usize, name: &str| {
        let file = trio.place.dir.join(format!("{name}.json"));
        fs::write(&file, instance(name).to_string()).unwrap();
        trio.exoctl(through, &["apply", "-f", file.to_str().unwrap()]).unwrap()
    };
    // Its disk is filled while it leads, which it does unless the machine was too busy for that.
    let led = trio.leader().unwrap() == 0;
    let ballast = volume.path().join("ballast");
    fill_up(&ballast);
    let began = Instant::now();
    let written = create(1, "meanwhile");
    let text = String::from_utf8_lossy(&written.stderr).into_owned();
    eprintln!("it led: {led}; the first write took {:?}", began.elapsed());
    assert!(written.status.success(), "{text}{}", trio.logs());
    assert_ne!(trio.leader_among(&[1, 2]).unwrap(), 0);
    assert!(create(2, "again").status.success(), "{}", trio.logs());
    fs::remove_file(&ballast).unwrap();
    wait_for("the node to have all", || {
        let listed = trio.exoctl(0, &["get", "instances", "-o", "name"])?;
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        Ok((listed.contains("/meanwhile") && listed.contains("/again")).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error:#}{}", trio.logs()));
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
    let full = "the disk of node mac-1 is full: ";
    assert!(body["message"].as_str().unwrap().contains(full), "{body}");
    let exoctl = |args: &[&str]| {
        let mut command = Command::new(binary("exoctl").unwrap());
        let kubeconfig = exo.data_dir.join("kubeconfig");
        command.arg("--kubeconfig").arg(kubeconfig).args(args).output().unwrap()
    };
    let scaled = exoctl(&["scale", "instance", "before", "--replicas", "2"]);
    let said = String::from_utf8_lossy(&scaled.stderr).into_owned();
    assert!(!scaled.status.success() && said.contains(full), "{said}");
    let listed = exoctl(&["get", "instances", "-o", "name"]);
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert_eq!(listed, "inferenceinstance.exo.dev/before\n", "reads go on");

    // It may even end and begin without room, be it for one byte.
    exo.kill().unwrap();
    let rest = volume.path().join("rest");
    fill_up(&rest);
    exo.restart().unwrap();
    assert_eq!(refused("meanwhile").0, StatusCode::INSUFFICIENT_STORAGE);
    let ready = async || {
        let answer = admin.client.get(format!("{}/readyz", admin.url)).send().await?;
        Ok((answer.status(), answer.text().await?))
    };
    let (code, why) = in_the_end("/readyz", || runtime.block_on(ready())).unwrap();
    assert_eq!(code, StatusCode::SERVICE_UNAVAILABLE, "{why}");
    assert!(why.contains("[-]disk failed: writes are refused: the disk of node mac-1"), "{why}");
    fs::remove_file(&rest).unwrap();
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
