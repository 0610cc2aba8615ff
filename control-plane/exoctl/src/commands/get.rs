//! `exoctl get`: tables as the server makes them, or whole objects; once or as they change.

use std::{io::Write, time::Duration};

use anyhow::{Context as _, bail};
use futures::{TryStreamExt as _, pin_mut};
use kube::core::WatchEvent;
use serde_json::{Value, json};

use super::select::{self, Selected, nothing_found};
use crate::{
    cli::{Get, Output},
    error::Collector,
    kinds::Kind,
    server::{Form, Server},
    table::{Printer, Style, Table},
};

const EMPTY_WATCH_PAUSE: Duration = Duration::from_millis(250);

pub(super) async fn run(args: &Get, server: &Server, out: &mut dyn Write) -> anyhow::Result<()> {
    let selected = select::read(server, &args.kind, &args.names).await?;
    let named = selected.iter().any(|s| !s.names.is_empty());
    if named && (args.select.labels.is_some() || args.select.all_namespaces) {
        bail!("names go with neither a selector nor --all-namespaces");
    }
    if args.watch {
        return match selected.as_slice() {
            [one] if one.names.len() <= 1 => watch(args, server, one, out).await,
            _ => bail!("only one kind, or one object, can be watched at a time"),
        };
    }
    match args.output {
        None | Some(Output::Wide) => tables(args, server, &selected, out).await,
        Some(form) => objects(args, form, server, &selected, out).await,
    }
}

async fn tables(
    args: &Get,
    server: &Server,
    selected: &[Selected<'_>],
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let mut failures = Collector::default();
    let mut printed = false;
    for one in selected {
        let mut table = Table::default();
        for path in paths(args, server, one) {
            let fetched = fetch_table(server, &path, &args.select.query()).await;
            if let Some(fetched) = failures.note(fetched)? {
                table.column_definitions = fetched.column_definitions;
                table.rows.extend(fetched.rows);
            }
        }
        if table.rows.is_empty() {
            if one.names.is_empty() && selected.len() == 1 {
                note(&nothing_found(one.kind, &args.select, server));
            }
            continue;
        }
        if std::mem::replace(&mut printed, true) {
            writeln!(out)?;
        }
        let style = style(args, one.kind, selected.len() > 1);
        Printer::new(&table.column_definitions, style).print(
            out,
            &table.column_definitions,
            &table.rows,
        )?;
    }
    if !printed && selected.len() > 1 && failures.is_empty() {
        note("No resources found");
    }
    failures.finish()
}

async fn objects(
    args: &Get,
    form: Output,
    server: &Server,
    selected: &[Selected<'_>],
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let mut failures = Collector::default();
    let mut found = Vec::new();
    let mut asked_for_one = false;
    for one in selected {
        asked_for_one = selected.len() == 1 && one.names.len() == 1;
        if one.names.is_empty() {
            let items = select::list(server, one.kind, &args.select).await;
            let items = failures.note(items)?.unwrap_or_default();
            found.extend(items.into_iter().map(|item| (one.kind, item)));
            continue;
        }
        for path in paths(args, server, one) {
            let object = server.get::<Value>(&path, &[], Form::Json).await;
            found.extend(failures.note(object)?.map(|object| (one.kind, object)));
        }
    }
    if form == Output::Name {
        for (kind, object) in &found {
            write_object(form, kind, object, out)?;
        }
    } else if asked_for_one {
        if let Some((kind, object)) = found.first() {
            write_object(form, kind, object, out)?;
        }
    } else {
        let items: Vec<_> = found.into_iter().map(|(_, object)| object).collect();
        let list = json!({"apiVersion": "v1", "kind": "List", "items": items,
                          "metadata": {"resourceVersion": ""}});
        write_value(form, &list, out)?;
    }
    failures.finish()
}

/// The paths to ask: one for each name, or the whole list.
fn paths(args: &Get, server: &Server, one: &Selected<'_>) -> Vec<String> {
    let namespace = args.select.namespace(server);
    if one.names.is_empty() {
        return vec![one.kind.path(namespace, None)];
    }
    let path = |name: &String| one.kind.path(namespace, Some(name));
    one.names.iter().map(path).collect()
}

fn style(args: &Get, kind: &Kind, several: bool) -> Style {
    Style {
        wide: args.output == Some(Output::Wide),
        with_namespace: args.select.all_namespaces && kind.namespaced,
        header: !args.no_headers,
        prefix: if several { kind.named("") } else { String::new() },
    }
}

async fn fetch_table(server: &Server, path: &str, query: &[(&str, &str)]) -> anyhow::Result<Table> {
    let table: Table = server.get(path, query, Form::Table).await?;
    if table.kind != "Table" {
        bail!("the server can't print tables of {path}; use -o yaml");
    }
    Ok(table)
}

/// Prints what is there, then every change. Ends only with an error, or when nobody reads on.
async fn watch(
    args: &Get,
    server: &Server,
    one: &Selected<'_>,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let path = one.kind.path(args.select.namespace(server), None);
    let by_name = one.names.first().map(|name| format!("metadata.name={name}"));
    let mut select = args.select.clone();
    select.fields = match (by_name, select.fields) {
        (Some(name), Some(fields)) => Some(format!("{name},{fields}")),
        (name, fields) => name.or(fields),
    };
    let mut view = View::new(args, one.kind);
    let mut version = view.list(server, &path, &select.query(), out).await?;
    if view.is_empty && !one.names.is_empty() {
        bail!("{} not found", one.kind.named(&one.names[0]));
    }
    loop {
        let mut query = select.query();
        query.extend([("watch", "true"), ("resourceVersion", version.as_str())]);
        let events = server.watch::<Value>(&path, &query, view.form).await?;
        pin_mut!(events);
        let mut expired = false;
        let mut last = version.clone();
        while let Some(event) = events.try_next().await.map_err(|e| server.explain(e))? {
            match event {
                WatchEvent::Added(o) | WatchEvent::Modified(o) | WatchEvent::Deleted(o) => {
                    if let Some(seen) = view.show(o, out)? {
                        last = seen;
                    }
                }
                WatchEvent::Bookmark(bookmark) => last = bookmark.metadata.resource_version,
                WatchEvent::Error(status) if status.code == 410 => expired = true,
                WatchEvent::Error(status) => return Err(server.explain(kube::Error::Api(status))),
            }
        }
        if last == version {
            // A server that ends watches at once must not be asked without pause.
            tokio::time::sleep(EMPTY_WATCH_PAUSE).await;
        }
        // Servers end watches after a while; that one goes on where it ended, or anew.
        version = match expired {
            true => view.list(server, &path, &select.query(), out).await?,
            false => last,
        };
    }
}

/// How a watch is printed.
struct View<'a> {
    form: Form,
    output: Option<Output>,
    kind: &'a Kind,
    style: Style,
    columns: Vec<crate::table::Column>,
    printer: Option<Printer>,
    is_empty: bool,
}

impl<'a> View<'a> {
    fn new(args: &Get, kind: &'a Kind) -> Self {
        let form = match args.output {
            None | Some(Output::Wide) => Form::Table,
            Some(Output::Json | Output::Yaml | Output::Name) => Form::Json,
        };
        Self {
            form,
            output: args.output,
            kind,
            style: style(args, kind, false),
            columns: Vec::new(),
            printer: None,
            is_empty: true,
        }
    }

    /// Prints the list and returns its resource version.
    async fn list(
        &mut self,
        server: &Server,
        path: &str,
        query: &[(&str, &str)],
        out: &mut dyn Write,
    ) -> anyhow::Result<String> {
        let mut list: Value = server.get(path, query, self.form).await?;
        let version = list["metadata"]["resourceVersion"].as_str().map(str::to_owned);
        if self.form == Form::Table {
            self.is_empty = list["rows"].as_array().is_none_or(Vec::is_empty);
            self.show(list, out)?;
        } else {
            let items = select::take_items(&mut list, self.kind);
            self.is_empty = items.is_empty();
            for item in items {
                self.show(item, out)?;
            }
        }
        version.context("the server's list has no resourceVersion")
    }

    /// Prints a table or an object; returns the newest resource version it holds.
    fn show(&mut self, value: Value, out: &mut dyn Write) -> anyhow::Result<Option<String>> {
        let version = match self.form {
            Form::Json => {
                let version = value["metadata"]["resourceVersion"].as_str().map(str::to_owned);
                let form = self.output.unwrap_or(Output::Json);
                if form == Output::Yaml && !std::mem::replace(&mut self.is_empty, false) {
                    writeln!(out, "---")?;
                }
                write_object(form, self.kind, &value, out)?;
                version
            }
            Form::Table => {
                let table: Table = serde_json::from_value(value).context("reading a table")?;
                if !table.column_definitions.is_empty() {
                    self.columns = table.column_definitions;
                }
                let (columns, style) = (&self.columns, &mut self.style);
                let printer = match &mut self.printer {
                    Some(printer) => printer,
                    // A header over nothing would be all there is to see.
                    none if table.rows.is_empty() => {
                        *none = None;
                        return Ok(None);
                    }
                    none => none.insert(Printer::new(columns, std::mem::take(style))),
                };
                printer.print(out, columns, &table.rows)?;
                let last = table.rows.last();
                last.map(|row| row.object.metadata.resource_version.clone())
            }
        };
        out.flush()?;
        Ok(version.filter(|version| !version.is_empty()))
    }
}

fn write_object(
    form: Output,
    kind: &Kind,
    object: &Value,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    if form == Output::Name {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        writeln!(out, "{}", kind.named(name))?;
        return Ok(());
    }
    write_value(form, object, out)
}

fn write_value(form: Output, value: &Value, out: &mut dyn Write) -> anyhow::Result<()> {
    // kubectl prints fields by name, whatever their order on the wire.
    let mut value = value.clone();
    hide_managers(&mut value);
    value.sort_all_objects();
    match form {
        Output::Yaml => write!(out, "{}", exo_crds::yaml::to_string(&value)?)?,
        Output::Json | Output::Name | Output::Wide => {
            // Pretty, as kubectl prints it, but with its indentation of four.
            let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
            let mut serializer = serde_json::Serializer::with_formatter(&mut *out, formatter);
            serde::Serialize::serialize(&value, &mut serializer)?;
            writeln!(out)?;
        }
    }
    Ok(())
}

/// Which client is responsible for which field is of no interest to people; kubectl hides it too.
fn hide_managers(value: &mut Value) {
    if let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("managedFields");
    }
    if let Some(Value::Array(items)) = value.get_mut("items") {
        items.iter_mut().for_each(hide_managers);
    }
}

/// A line for people; results go to stdout.
fn note(text: &str) {
    eprintln!("{text}");
}
