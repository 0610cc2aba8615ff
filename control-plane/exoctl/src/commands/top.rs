//! `exoctl top`: memory and throughput, as agents last reported them.

use std::io::Write;

use exo_crds::Quantity;
use serde_json::{Value, json};

use super::select::{self, checked, nothing_found};
use crate::{
    cli::{Top, TopOf},
    error::Collector,
    jsonpath::plain,
    server::{Form, Server},
    table::{Column, Printer, Row, Style},
};

pub(super) async fn run(args: &Top, server: &Server, out: &mut dyn Write) -> anyhow::Result<()> {
    let (kind, names, cells): (_, &[&str], fn(&Value) -> _) = match args.what {
        TopOf::Nodes => ("Node", &["NAME", "MEMORY", "USED", "FREE", "USED%", "SHARDS"], node),
        TopOf::Shards => ("Shard", &["NAME", "NODE", "PHASE", "MEMORY", "TOKENS/S"], shard),
    };
    let kind = server.own_kind(kind).await?;
    let mut failures = Collector::default();
    let mut objects = Vec::new();
    if args.names.is_empty() {
        objects = select::list(server, kind, &args.select).await?;
    }
    for name in &args.names {
        let path = kind.path(args.select.namespace(server), Some(&checked(name)?));
        objects.extend(failures.note(server.get::<Value>(&path, &[], Form::Json).await)?);
    }
    if args.what == TopOf::Nodes {
        count_shards(server, &mut objects).await?;
    }
    if objects.is_empty() && failures.is_empty() {
        eprintln!("{}", nothing_found(kind, &args.select, server));
        return Ok(());
    }
    let columns: Vec<Column> =
        names.iter().map(|name| Column { name: (*name).to_owned(), priority: 0 }).collect();
    let rows: Vec<Row> =
        objects.into_iter().map(|object| Row { cells: cells(&object), object }).collect();
    let style = Style {
        with_namespace: args.select.all_namespaces && kind.namespaced,
        header: !args.no_headers,
        ..Style::default()
    };
    Printer::new(&columns, style).print(out, &columns, &rows)?;
    failures.finish()
}

/// Adds to each node how many shards it runs.
async fn count_shards(server: &Server, nodes: &mut [Value]) -> anyhow::Result<()> {
    let kind = server.own_kind("Shard").await?;
    let everywhere = crate::cli::Select { all_namespaces: true, ..Default::default() };
    let shards = select::list(server, kind, &everywhere).await?;
    for node in nodes {
        let here = shards.iter().filter(|s| s["spec"]["node"] == node["metadata"]["name"]);
        node["shards"] = here.count().into();
    }
    Ok(())
}

const UNKNOWN: &str = "<unknown>";

fn node(object: &Value) -> Vec<Value> {
    let memory = &object["status"]["memory"];
    let name = object["metadata"]["name"].clone();
    let shards = object["shards"].clone();
    let (Some(total), Some(free)) = (memory["totalBytes"].as_u64(), memory["freeBytes"].as_u64())
    else {
        return vec![name, json!(UNKNOWN), json!(UNKNOWN), json!(UNKNOWN), json!(UNKNOWN), shards];
    };
    let used = total.saturating_sub(free);
    let size = |bytes: u64| json!(Quantity::from_bytes(bytes).rounded().to_string());
    let percent = json!(format!("{}%", used * 100 / total.max(1)));
    vec![name, size(total), size(used), size(free), percent, shards]
}

fn shard(object: &Value) -> Vec<Value> {
    let (spec, status) = (&object["spec"], &object["status"]);
    let or_unknown = |value: &Value| match value {
        Value::Null => json!(UNKNOWN),
        value => json!(plain(value)),
    };
    // Only rank 0 counts tokens, once it has made some.
    let speed = status["tokensPerSecond"].as_f64();
    let speed = speed.map_or_else(|| "<none>".to_owned(), |speed| format!("{speed:.1}"));
    vec![
        object["metadata"]["name"].clone(),
        spec["node"].clone(),
        or_unknown(&status["phase"]),
        or_unknown(&status["memory"]),
        json!(speed),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_reported_is_unknown() {
        let texts = |cells: Vec<Value>| cells.iter().map(plain).collect::<Vec<_>>();
        let gib = 1_u64 << 30;
        let known = json!({"metadata": {"name": "a"}, "shards": 2,
            "status": {"memory": {"totalBytes": 64 * gib, "freeBytes": 48 * gib}}});
        assert_eq!(texts(node(&known)), ["a", "64Gi", "16Gi", "48Gi", "25%", "2"]);
        let unknown = json!({"metadata": {"name": "a"}, "shards": 0});
        assert_eq!(texts(node(&unknown))[1], UNKNOWN);
        let loading = json!({"metadata": {"name": "s"}, "spec": {"node": "a"},
            "status": {"phase": "Loading"}});
        assert_eq!(texts(shard(&loading)), ["s", "a", "Loading", UNKNOWN, "<none>"]);
        let busy = json!({"metadata": {"name": "s"}, "spec": {"node": "a"},
            "status": {"phase": "Ready", "memory": "19Gi", "tokensPerSecond": 12.34}});
        assert_eq!(texts(shard(&busy)), ["s", "a", "Ready", "19Gi", "12.3"]);
    }
}
