//! `exoctl edit` with editors that are shell commands.

use crate::cluster::{Cluster, Output};

const CHAT: &str = "{apiVersion: exo.dev/v1alpha1, kind: InferenceInstance, \
                    metadata: {name: chat}, spec: {model: tiny}}";

async fn cluster() -> Cluster {
    let cluster = Cluster::start().await;
    let applied = cluster.run_with_input(&["apply", "-f", "-"], CHAT).await;
    assert_eq!(applied.code, 0, "{}", applied.stderr);
    cluster
}

/// Runs it with an editor that is a script; `$1` is the file, `$n` counts its runs from 1.
async fn edit(cluster: &Cluster, script: &str) -> Output {
    let counted = format!(
        "n=$(cat runs 2>/dev/null || echo 0); n=$((n + 1)); echo $n > runs\n\
         cp \"$1\" shown.$n\n{script}\n"
    );
    std::fs::write(cluster.dir.path().join("editor.sh"), counted).unwrap();
    let mut command = cluster.command(&["edit", "instance", "chat"]);
    command.env("KUBE_EDITOR", "sh editor.sh").env("TMPDIR", cluster.dir.path());
    let output = tokio::time::timeout(crate::cluster::PATIENCE, command.output()).await;
    let output = output.expect("exoctl ends").unwrap();
    Output {
        code: output.status.code().unwrap(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// What the editor was given in its nth run.
fn shown(cluster: &Cluster, n: u32) -> String {
    std::fs::read_to_string(cluster.dir.path().join(format!("shown.{n}"))).unwrap()
}

fn was_opened_again(cluster: &Cluster, n: u32) -> bool {
    cluster.dir.path().join(format!("shown.{n}")).exists()
}

async fn field(cluster: &Cluster, path: &str) -> String {
    let output = format!("jsonpath={{{path}}}");
    cluster.run(&["get", "instance", "chat", "-o", &output]).await.stdout
}

#[tokio::test]
async fn what_was_changed_is_sent_and_nothing_else() {
    let cluster = cluster().await;
    let edited = edit(&cluster, "sed -i 's/replicas: 1/replicas: 2/' \"$1\"").await;
    assert_eq!(edited.stdout, "inferenceinstance.exo.dev/chat edited\n", "{}", edited.stderr);
    assert_eq!(field(&cluster, ".spec.replicas").await, "2");
    let text = shown(&cluster, 1);
    assert!(text.starts_with('#'), "{text}");
    for hidden in ["managedFields", "resourceVersion", "status", "uid"] {
        assert!(!text.contains(hidden), "{text}");
    }
}

#[tokio::test]
async fn no_change_changes_nothing() {
    let cluster = cluster().await;
    for script in ["true", ": > \"$1\"", "echo '# a thought' >> \"$1\""] {
        let edited = edit(&cluster, script).await;
        assert_eq!((edited.code, edited.stdout.as_str()), (0, ""), "{script}: {}", edited.stderr);
        assert!(edited.stderr.contains("nothing was changed"), "{}", edited.stderr);
    }
    let failed = edit(&cluster, "exit 3").await;
    assert_eq!(failed.code, 1);
    assert!(failed.stderr.contains("sh editor.sh"), "{}", failed.stderr);
}

#[tokio::test]
async fn what_is_refused_is_edited_again_with_the_reason() {
    let cluster = cluster().await;
    let script = "case $n in\n\
         1) sed -i 's/replicas: 1/replicas: [/' \"$1\" ;;\n\
         2) sed -i 's/replicas: \\[/replicas: 100/' \"$1\" ;;\n\
         3) sed -i 's/replicas: 100/replicaas: 2/' \"$1\" ;;\n\
         4) sed -i 's/replicaas: 2/replicas: 2/; s/name: chat/name: chart/' \"$1\" ;;\n\
         5) sed -i 's/name: chart/name: chat/' \"$1\" ;;\n\
         esac";
    let edited = edit(&cluster, script).await;
    assert_eq!(edited.stdout, "inferenceinstance.exo.dev/chat edited\n", "{}", edited.stderr);
    assert_eq!(field(&cluster, ".spec.replicas").await, "2");
    for (run, complaint, text) in [
        (2, "# document 1: ", "replicas: ["),
        (3, "spec.replicas", "replicas: 100"),
        (4, "unknown field \"spec.replicaas\"", "replicaas: 2"),
        (5, "# metadata.name can't be changed: it is chat", "name: chart"),
    ] {
        let shown = shown(&cluster, run);
        assert!(shown.contains(complaint) && shown.contains(text), "{run}: {shown}");
        assert_eq!(shown.matches("Lines that begin with #").count(), 1, "{shown}");
    }
}

#[tokio::test]
async fn giving_up_keeps_the_text() {
    let cluster = cluster().await;
    let script = "[ $n -gt 1 ] || sed -i 's/replicas: 1/replicas: 100/' \"$1\"";
    let edited = edit(&cluster, script).await;
    assert_eq!(edited.code, 1);
    assert_eq!(field(&cluster, ".spec.replicas").await, "1");
    let path = edited.stderr.split("the edited text is in ").nth(1).expect("it names the file");
    let text = std::fs::read_to_string(path.trim().trim_end_matches(')')).unwrap();
    assert!(text.contains("replicas: 100") && !text.starts_with('#'), "{text}");
}

/// Runs `exoctl` within the editor, as somebody else.
fn meanwhile(patch: &str) -> String {
    format!("{} patch instance chat -p '{patch}' >/dev/null", env!("CARGO_BIN_EXE_exoctl"))
}

#[tokio::test]
async fn changes_of_others_to_other_fields_are_kept() {
    let cluster = cluster().await;
    let script = format!(
        "{}\nsed -i 's/replicas: 1/replicas: 2/' \"$1\"",
        meanwhile("{\"spec\": {\"seed\": 7}}")
    );
    let edited = edit(&cluster, &script).await;
    assert_eq!(edited.stdout, "inferenceinstance.exo.dev/chat edited\n", "{}", edited.stderr);
    assert_eq!(field(&cluster, ".spec.replicas} {.spec.seed").await, "2 7");
    assert!(!was_opened_again(&cluster, 2));
}

#[tokio::test]
async fn changes_of_others_to_the_same_field_are_shown() {
    let cluster = cluster().await;
    let script = format!(
        "if [ $n = 1 ]; then\n{}\nsed -i 's/replicas: 1/replicas: 2/' \"$1\"\n\
         else sed -i 's/replicas: 2/replicas: 4/' \"$1\"; fi",
        meanwhile("{\"spec\": {\"replicas\": 3, \"seed\": 7}}")
    );
    let edited = edit(&cluster, &script).await;
    assert_eq!(edited.stdout, "inferenceinstance.exo.dev/chat edited\n", "{}", edited.stderr);
    let again = shown(&cluster, 2);
    assert!(
        again.contains("# somebody else changed this meanwhile: spec.replicas is 3 now"),
        "{again}"
    );
    assert!(again.contains("replicas: 2") && again.contains("seed: 7"), "{again}");
    assert_eq!(field(&cluster, ".spec.replicas} {.spec.seed").await, "4 7");
}

#[tokio::test]
async fn the_same_refused_text_twice_ends_it() {
    let cluster = cluster().await;
    // Writes the whole file each time, without the reason at its top.
    let script = "grep -v '^#' \"$1\" | sed 's/replicas: .*/replicas: many/' > new; mv new \"$1\"";
    let edited = edit(&cluster, script).await;
    assert_ne!(edited.code, 0);
    assert!(edited.stderr.contains("spec.replicas"), "{}", edited.stderr);
    assert!(edited.stderr.contains("the edited text is in"), "{}", edited.stderr);
    assert!(was_opened_again(&cluster, 2) && !was_opened_again(&cluster, 3));
}
