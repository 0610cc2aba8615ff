//! `exoctl api-resources`: the kinds that a server has, and what to call them.

use std::io::Write;

use exo_crds::GROUP;
use serde_json::json;

use crate::{
    cli::ApiResources,
    kinds::Kind,
    server::Server,
    table::{Column, Printer, Row, Style},
};

pub(super) async fn run(
    args: &ApiResources,
    server: &Server,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let columns: Vec<Column> = ["NAME", "SHORTNAMES", "APIVERSION", "NAMESPACED", "KIND"]
        .map(|name| Column { name: name.to_owned(), priority: 0 })
        .into();
    let mut kinds: Vec<&Kind> = server.kinds().await?.iter().collect();
    // Exo's own come first.
    kinds.sort_by_key(|kind| (kind.api.group != GROUP, &kind.api.group, &kind.api.plural));
    let rows: Vec<Row> = kinds
        .into_iter()
        .map(|kind| Row {
            cells: vec![
                json!(kind.api.plural),
                json!(kind.short_names().join(",")),
                json!(kind.api.api_version),
                json!(kind.namespaced.to_string()),
                json!(kind.api.kind),
            ],
            ..Row::default()
        })
        .collect();
    let style = Style { header: !args.no_headers, ..Style::default() };
    Printer::new(&columns, style).print(out, &columns, &rows)?;
    Ok(())
}
