//! Tables in kubectl's style: upper-case header, columns apart by three spaces, no borders.

use std::io::{self, Write};

use serde::Deserialize;
use serde_json::Value;

use crate::jsonpath::plain;

/// `meta.k8s.io/v1 Table`, as far as it is printed.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Table {
    pub(crate) kind: String,
    pub(crate) column_definitions: Vec<Column>,
    pub(crate) rows: Vec<Row>,
}

#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Column {
    pub(crate) name: String,
    /// 0 is always shown, more only when asked for.
    #[serde(default)]
    pub(crate) priority: i32,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Row {
    pub(crate) cells: Vec<Value>,
    /// The object, or no more than its metadata.
    pub(crate) object: Value,
}

impl Row {
    /// A text of the object's metadata; empty when there is none.
    pub(crate) fn metadata(&self, field: &str) -> &str {
        self.object["metadata"][field].as_str().unwrap_or_default()
    }
}

/// What is shown of a table.
#[derive(Clone, Debug, Default)]
pub(crate) struct Style {
    pub(crate) wide: bool,
    pub(crate) with_namespace: bool,
    pub(crate) with_labels: bool,
    /// Leaves the first column out, which is the name.
    pub(crate) nameless: bool,
    pub(crate) header: bool,
    /// Before each name: `shard.exo.dev/`.
    pub(crate) prefix: String,
}

/// Prints tables of one shape, each at least as wide as those before.
#[derive(Debug)]
pub(crate) struct Printer {
    style: Style,
    /// Positions of the columns shown.
    shown: Vec<usize>,
    widths: Vec<usize>,
}

/// kubectl's: a column is never narrower, the gap to the next one included.
const MIN_WIDTH: usize = 6;
const GAP: usize = 3;

impl Printer {
    pub(crate) fn new(columns: &[Column], style: Style) -> Self {
        let shown = (usize::from(style.nameless)..columns.len())
            .filter(|&i| style.wide || columns[i].priority == 0)
            .collect();
        Self { style, shown, widths: Vec::new() }
    }

    /// Prints the header if wanted, and `rows`.
    pub(crate) fn print(
        &mut self,
        out: &mut dyn Write,
        columns: &[Column],
        rows: &[Row],
    ) -> io::Result<()> {
        let mut lines = Vec::with_capacity(rows.len() + 1);
        if std::mem::take(&mut self.style.header) {
            let namespace = self.style.with_namespace.then(|| "NAMESPACE".to_owned());
            let names = self.shown.iter().map(|&i| columns[i].name.to_uppercase());
            let labels = self.style.with_labels.then(|| "LABELS".to_owned());
            lines.push(namespace.into_iter().chain(names).chain(labels).collect());
        }
        lines.extend(rows.iter().map(|row| self.line(row)));
        self.widen(&lines);
        for line in lines {
            writeln!(out, "{}", self.aligned(&line))?;
        }
        Ok(())
    }

    fn line(&self, row: &Row) -> Vec<String> {
        let namespace = row.metadata("namespace").to_owned();
        let cells = self.shown.iter().enumerate().map(|(position, &i)| {
            let text = row.cells.get(i).map(cell).unwrap_or_default();
            match position {
                0 => format!("{}{text}", self.style.prefix),
                _ => text,
            }
        });
        let namespace = self.style.with_namespace.then_some(namespace);
        let labels = self.style.with_labels.then(|| labels(&row.object));
        namespace.into_iter().chain(cells).chain(labels).collect()
    }

    fn widen(&mut self, lines: &[Vec<String>]) {
        for line in lines {
            self.widths.resize(self.widths.len().max(line.len()), MIN_WIDTH - GAP);
            for (width, cell) in self.widths.iter_mut().zip(line) {
                *width = (*width).max(cell.chars().count());
            }
        }
    }

    /// Columns are padded, but for the last one.
    fn aligned(&self, line: &[String]) -> String {
        let mut text = String::new();
        for (i, cell) in line.iter().enumerate() {
            text += cell;
            if i + 1 < line.len() {
                let pad = self.widths[i] + GAP - cell.chars().count();
                text.extend(std::iter::repeat_n(' ', pad));
            }
        }
        text
    }
}

/// `key=value` of each label, joined by commas.
fn labels(object: &Value) -> String {
    let labels = object["metadata"]["labels"].as_object();
    let pairs = labels.into_iter().flatten();
    let pairs: Vec<_> = pairs.map(|(key, value)| format!("{key}={}", plain(value))).collect();
    if pairs.is_empty() { "<none>".to_owned() } else { pairs.join(",") }
}

/// One line without control characters: a cell must not move the cursor.
fn cell(value: &Value) -> String {
    let text = match value {
        Value::Null => return String::new(),
        Value::String(text) => text.as_str(),
        other => return other.to_string(),
    };
    let mut lines = text.lines();
    let first = lines.next().unwrap_or_default();
    let more = if lines.next().is_some() { "..." } else { "" };
    first.chars().map(|c| if c.is_control() { ' ' } else { c }).chain(more.chars()).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn table() -> Table {
        serde_json::from_value(json!({
            "kind": "Table",
            "columnDefinitions": [
                {"name": "Name", "type": "string", "format": "name", "priority": 0},
                {"name": "OS", "type": "string", "priority": 0},
                {"name": "Error", "type": "string", "priority": 1},
                {"name": "Rank", "type": "integer", "priority": 0},
                {"name": "Age", "type": "date", "priority": 0},
            ],
            "rows": [
                {"cells": ["llama-0-a1-0", "é", null, 0, "3m"],
                 "object": {"metadata": {"namespace": "default", "name": "llama-0-a1-0",
                                         "labels": {"a": "1", "b": "2"}}}},
                {"cells": ["b", "linux", "bad\u{1b}[2J\nthing", 10, "3m"],
                 "object": {"metadata": {"namespace": "team", "name": "b"}}},
            ],
        }))
        .unwrap()
    }

    fn print(style: Style) -> String {
        let table = table();
        let mut out = Vec::new();
        Printer::new(&table.column_definitions, style)
            .print(&mut out, &table.column_definitions, &table.rows)
            .unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn prints_as_kubectl_does() {
        let style = Style { header: true, ..Style::default() };
        assert_eq!(
            print(style),
            "NAME           OS      RANK   AGE\n\
             llama-0-a1-0   é       0      3m\n\
             b              linux   10     3m\n"
        );
    }

    #[test]
    fn shows_more_when_asked() {
        let style = Style {
            wide: true,
            with_namespace: true,
            header: true,
            prefix: "shard/".into(),
            ..Style::default()
        };
        assert_eq!(
            print(style),
            "NAMESPACE   NAME                 OS      ERROR        RANK   AGE\n\
             default     shard/llama-0-a1-0   é                    0      3m\n\
             team        shard/b              linux   bad [2J...   10     3m\n"
        );
    }

    #[test]
    fn labels_come_last() {
        let style = Style { with_labels: true, ..Style::default() };
        assert_eq!(
            print(style),
            "llama-0-a1-0   é       0     3m    a=1,b=2\n\
             b              linux   10    3m    <none>\n"
        );
    }

    #[test]
    fn narrow_columns_keep_kubectls_least_width() {
        let columns: Vec<Column> =
            serde_json::from_value(json!([{"name": "A"}, {"name": "B"}])).unwrap();
        let rows: Vec<Row> = serde_json::from_value(json!([{"cells": ["x", "y"]}])).unwrap();
        let mut out = Vec::new();
        let mut printer = Printer::new(&columns, Style { header: true, ..Style::default() });
        printer.print(&mut out, &columns, &rows).unwrap();
        let wider: Vec<Row> = serde_json::from_value(json!([{"cells": ["xxxx", "y"]}])).unwrap();
        printer.print(&mut out, &columns, &wider).unwrap();
        printer.print(&mut out, &columns, &rows).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "A     B\nx     y\nxxxx   y\nx      y\n");
    }
}
