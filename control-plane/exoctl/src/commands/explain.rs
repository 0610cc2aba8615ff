//! `exoctl explain placement`: where an instance of a model would go now, and why not elsewhere.
//!
//! It asks the very function that the instance controller asks, with what the server has now; nothing
//! is written.

use std::{collections::BTreeMap, io::Write};

use anyhow::{Context as _, bail};
use exo_crds::{InferenceInstance, InferenceInstanceSpec, Model, Node, Quantity, Shard};
use exo_plan::{NodeState, Observed, Placement, preview};
use k8s_openapi::jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::select::{self, checked};
use crate::{
    cli::{Explain, Select},
    kinds::closest,
    server::Server,
    table::{Column, Printer, Row, Style},
};

pub(super) async fn run(
    args: &Explain,
    server: &Server,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let name = checked(args.model.trim_start_matches("model/"))?;
    let models: Vec<Model> = all(server, "Model").await?;
    let models: BTreeMap<String, Model> = models
        .into_iter()
        .map(|model| (model.metadata.name.clone().unwrap_or_default(), model))
        .collect();
    let Some(model) = models.get(&name) else {
        let meant = closest(&name, models.keys().map(String::as_str));
        bail!("there is no model named `{name}`{}", crate::kinds::did_you_mean(meant));
    };
    let nodes: Vec<Node> = all(server, "Node").await?;
    let shards: Vec<Shard> = all(server, "Shard").await?;
    let observed = Observed {
        instance: &InferenceInstance::new("preview", spec(args, &name)?),
        models: &models,
        nodes: &nodes,
        shards: &shards,
        now: Timestamp::now(),
    };
    let (states, placed) = preview(&observed, model);
    match placed {
        Ok(placement) => print(&placement, &states, out),
        Err(refusal) => {
            let rows = refusal.nodes.iter().map(|(node, why)| vec![node.clone(), why.to_string()]);
            table(&["NODE", "STATE"], rows, out)?;
            bail!("model `{name}` can't be placed: {}", refusal.why)
        }
    }
}

async fn all<T: DeserializeOwned>(server: &Server, kind: &str) -> anyhow::Result<Vec<T>> {
    let kind = server.own_kind(kind).await?;
    let everywhere = Select { all_namespaces: true, ..Select::default() };
    let items = select::list(server, kind, &everywhere).await?;
    items
        .into_iter()
        .map(|item| {
            serde_json::from_value(item).with_context(|| format!("reading a {}", kind.singular))
        })
        .collect()
}

/// The instance that would be asked for.
fn spec(args: &Explain, model: &str) -> anyhow::Result<InferenceInstanceSpec> {
    let mut selector = BTreeMap::new();
    for rule in args.labels.iter().flat_map(|labels| labels.split(',')) {
        let Some((key, value)) = rule.split_once('=') else {
            bail!("-l: `{rule}` is not KEY=VALUE");
        };
        selector.insert(key.to_owned(), value.trim_start_matches('=').to_owned());
    }
    let mut spec = json!({
        "model": model,
        "sharding": args.sharding.name(),
        "transport": args.transport.name(),
        "nodes": {"selector": selector},
    });
    if let Some(nodes) = args.nodes {
        spec["nodes"]["min"] = nodes.into();
        spec["nodes"]["max"] = nodes.into();
    }
    if let Some(tokens) = args.context_length {
        spec["contextLength"] = tokens.into();
    }
    serde_json::from_value(spec).context("making the instance to ask about")
}

fn print(placement: &Placement, states: &[NodeState], out: &mut dyn Write) -> anyhow::Result<()> {
    let how = serde_json::to_value(placement).context("reading the placement")?;
    let text = |field: &str| how[field].as_str().unwrap_or_default().to_owned();
    writeln!(
        out,
        "{} over {} on {} node(s), {} tokens of context",
        text("sharding"),
        text("transport"),
        placement.ranks.len(),
        placement.context_length
    )?;
    let size = |bytes: u64| Quantity::from_bytes(bytes).rounded().to_string();
    let free = |node: &str| states.iter().find(|s| s.name == node).and_then(|s| s.free_bytes);
    let rows = placement.ranks.iter().enumerate().map(|(rank, place)| {
        vec![
            rank.to_string(),
            place.node.clone(),
            place.layers.to_string(),
            size(place.memory_bytes),
            free(&place.node).map_or_else(|| "<unknown>".to_owned(), size),
        ]
    });
    table(&["RANK", "NODE", "LAYERS", "MEMORY", "FREE NOW"], rows, out)
}

fn table(
    names: &[&str],
    rows: impl Iterator<Item = Vec<String>>,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let columns: Vec<Column> =
        names.iter().map(|name| Column { name: (*name).to_owned(), priority: 0 }).collect();
    let rows: Vec<Row> = rows
        .map(|cells| Row {
            cells: cells.into_iter().map(Value::String).collect(),
            object: Value::Null,
        })
        .collect();
    if rows.is_empty() {
        return Ok(());
    }
    let style = Style { header: true, ..Style::default() };
    Ok(Printer::new(&columns, style).print(out, &columns, &rows)?)
}
