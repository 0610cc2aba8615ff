//! `exoctl get`: tables as the server makes them, or whole objects; once or as they change.

use std::{cmp::Ordering, io::Write, time::Duration};

use anyhow::{Context as _, bail};
use futures::{TryStreamExt as _, pin_mut};
use kube::core::WatchEvent;
use serde_json::Value;

use super::{
    events,
    select::{self, Selected, nothing_found},
};
use crate::{
    cli::{Get, Output},
    error::{Collector, Hinted, is_not_found, is_unavailable},
    jsonpath::{JsonPath, compare},
    kinds::Kind,
    output::Objects,
    server::{Form, Server},
    table::{Printer, Style, Table},
};

const EMPTY_WATCH_PAUSE: Duration = Duration::from_millis(250);

pub(super) async fn run(args: &Get, server: &Server, out: &mut dyn Write) -> anyhow::Result<()> {
    let Some(kind) = &args.kind else {
        bail!("say what to get: {}", server.kinds().await?.listed());
    };
    let selected = select::read(server, kind, &args.names).await?;
    let named = selected.iter().any(|s| !s.names.is_empty());
    if named && args.select.is_given() {
        bail!("names go with neither a selector nor --all-namespaces");
    }
    if args.watch || args.watch_only {
        if args.sort_by.is_some() {
            bail!("--sort-by needs all there is: it doesn't go with --watch");
        }
        return match selected.as_slice() {
            [one] if one.names.len() <= 1 => watch(args, server, one, out).await,
            _ => bail!("only one kind, or one object, can be watched at a time"),
        };
    }
    let got = match &args.output {
        None | Some(Output::Wide) => tables(args, server, &selected, out).await,
        Some(form) => objects(args, form, server, &selected, out).await,
    };
    match got {
        Err(error) if !args.stale && is_unavailable(&error) => {
            let hint = "--stale shows what this server had last".to_owned();
            Err(Hinted { error, hint }.into())
        }
        got => got,
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
        let mut query = query(args);
        let order = Order::of(args, one.kind);
        if order.is_some() {
            query.push(("includeObject", "Object"));
        }
        let mut table = Table::default();
        for path in paths(args, server, one) {
            let fetched = fetch_table(server, &path, &query).await;
            if args.ignore_not_found && fetched.as_ref().is_err_and(is_not_found) {
                continue;
            }
            if let Some(fetched) = failures.note(fetched)? {
                table.column_definitions = fetched.column_definitions;
                table.rows.extend(fetched.rows);
            }
        }
        if table.rows.is_empty() {
            if one.names.is_empty() && selected.len() == 1 && failures.is_empty() {
                note(&nothing_found(one.kind, &args.select, server));
            }
            continue;
        }
        if let Some(order) = order {
            let sorted = order.sort(one.kind, &mut table.rows, |row| &row.object);
            if failures.note(sorted)?.is_none() {
                continue;
            }
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

/// In which order objects are listed, where it isn't the server's.
enum Order<'a> {
    Path(&'a JsonPath),
    /// Events, the newest last.
    LastSeen,
}

impl<'a> Order<'a> {
    fn of(args: &'a Get, kind: &Kind) -> Option<Self> {
        let newest_last = || events::is_event(kind).then_some(Self::LastSeen);
        args.sort_by.as_ref().map(Self::Path).or_else(newest_last)
    }

    /// Puts in order what stands for objects of a kind.
    ///
    /// # Errors
    /// As with kubectl, when none of them has the field to go by: nobody means that.
    fn sort<T>(
        &self,
        kind: &Kind,
        things: &mut [T],
        object: impl Fn(&T) -> &Value,
    ) -> anyhow::Result<()> {
        if let Self::Path(path) = self {
            let has_it = |thing: &T| path.find(object(thing)).is_some();
            if !things.is_empty() && !things.iter().any(has_it) {
                bail!("--sort-by: none of the {} has the field {path}", kind.word());
            }
        }
        things.sort_by(|a, b| self.compare(object(a), object(b)));
        Ok(())
    }

    /// Objects without a value come first.
    fn compare(&self, a: &Value, b: &Value) -> Ordering {
        match self {
            Self::LastSeen => events::by_time(a, b),
            Self::Path(path) => match (path.find(a), path.find(b)) {
                (Some(a), Some(b)) => compare(a, b),
                (a, b) => a.is_some().cmp(&b.is_some()),
            },
        }
    }
}

async fn objects(
    args: &Get,
    form: &Output,
    server: &Server,
    selected: &[Selected<'_>],
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let mut failures = Collector::default();
    let mut found = Vec::new();
    let mut asked_for_one = false;
    for one in selected {
        asked_for_one = selected.len() == 1 && one.names.len() == 1;
        let mut objects = Vec::new();
        if one.names.is_empty() {
            let items = select::list_with(server, one.kind, &args.select, &query(args)).await;
            objects = failures.note(items)?.unwrap_or_default();
        } else {
            for path in paths(args, server, one) {
                let object = server.get::<Value>(&path, age(args), Form::Json).await;
                if args.ignore_not_found && object.as_ref().is_err_and(is_not_found) {
                    continue;
                }
                objects.extend(failures.note(object)?);
            }
        }
        if let Some(order) = Order::of(args, one.kind) {
            let sorted = order.sort(one.kind, &mut objects, |object| object);
            if failures.note(sorted)?.is_none() {
                continue;
            }
        }
        found.extend(objects.into_iter().map(|object| (one.kind, object)));
    }
    let mut printer = Objects::new(form.clone(), args.show_managed_fields, !args.no_headers);
    if !asked_for_one {
        printer.list(found, out)?;
    } else if let Some((kind, object)) = found.first() {
        printer.one(kind, object, out)?;
    }
    failures.finish()
}

/// How old an answer may be.
fn age(args: &Get) -> &'static [(&'static str, &'static str)] {
    if args.stale { &[("resourceVersion", "0")] } else { &[] }
}

fn query(args: &Get) -> Vec<(&str, &str)> {
    let mut query = args.select.query();
    query.extend(age(args));
    query
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
        with_labels: args.show_labels,
        // Nobody calls an event by its name.
        nameless: events::is_event(kind) && args.output.is_none() && !several,
        header: !args.no_headers,
        prefix: if several { kind.named("") } else { String::new() },
    }
}

pub(super) async fn fetch_table(
    server: &Server,
    path: &str,
    query: &[(&str, &str)],
) -> anyhow::Result<Table> {
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
    view.quiet = false;
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
    kind: &'a Kind,
    style: Style,
    columns: Vec<crate::table::Column>,
    printer: Option<Printer>,
    objects: Objects,
    is_empty: bool,
    /// Keeps to itself what is there already.
    quiet: bool,
}

impl<'a> View<'a> {
    fn new(args: &Get, kind: &'a Kind) -> Self {
        let form = match args.output {
            None | Some(Output::Wide) => Form::Table,
            Some(_) => Form::Json,
        };
        let output = args.output.clone().unwrap_or(Output::Json);
        Self {
            form,
            kind,
            style: style(args, kind, false),
            columns: Vec::new(),
            printer: None,
            objects: Objects::new(output, args.show_managed_fields, !args.no_headers),
            is_empty: true,
            quiet: args.watch_only,
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
        let version = version.context("the server's list has no resourceVersion")?;
        if self.form == Form::Table {
            self.is_empty = list["rows"].as_array().is_none_or(Vec::is_empty);
            if self.quiet {
                list["rows"] = Value::Array(Vec::new());
            }
            self.show(list, out)?;
        } else {
            let items = select::take_items(&mut list, self.kind);
            self.is_empty = items.is_empty();
            if !self.quiet {
                for item in items {
                    self.show(item, out)?;
                }
            }
        }
        Ok(version)
    }

    /// Prints a table or an object; returns the newest resource version it holds.
    fn show(&mut self, value: Value, out: &mut dyn Write) -> anyhow::Result<Option<String>> {
        let version = match self.form {
            Form::Json => {
                let version = value["metadata"]["resourceVersion"].as_str().map(str::to_owned);
                self.objects.one(self.kind, &value, out)?;
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
                table.rows.last().map(|row| row.metadata("resourceVersion").to_owned())
            }
        };
        out.flush()?;
        Ok(version.filter(|version| !version.is_empty()))
    }
}

/// A line for people; results go to stdout.
fn note(text: &str) {
    eprintln!("{text}");
}
