//! The forms of `-o` that print whole objects.

use std::io::Write;

use serde_json::{Value, json};

use crate::{
    cli::Output,
    jsonpath::{JsonPath, plain},
    kinds::Kind,
    table::{Column, Printer, Row, Style},
};

/// How whole objects are printed; tables of the server's are not its business.
#[derive(Debug)]
pub(crate) struct Objects {
    form: Output,
    /// Whether to show which client is responsible for which field.
    managers: bool,
    header: bool,
    columns: Option<Printer>,
    printed: bool,
}

impl Objects {
    pub(crate) fn new(form: Output, managers: bool, header: bool) -> Self {
        Self { form, managers, header, columns: None, printed: false }
    }

    /// Prints one object by itself; in a row of them, documents stay apart.
    pub(crate) fn one(
        &mut self,
        kind: &Kind,
        object: &Value,
        out: &mut dyn Write,
    ) -> anyhow::Result<()> {
        let again = std::mem::replace(&mut self.printed, true);
        match &self.form {
            Output::Name => {
                let name = object["metadata"]["name"].as_str().unwrap_or_default();
                writeln!(out, "{}", kind.named(name))?;
            }
            Output::JsonPath(template) => {
                // Several are told apart by lines.
                if again {
                    writeln!(out)?;
                }
                write!(out, "{}", template.print(object))?;
            }
            Output::Columns(_) => self.rows(std::slice::from_ref(object), out)?,
            Output::Yaml => {
                if again {
                    writeln!(out, "---")?;
                }
                self.whole(object, out)?;
            }
            Output::Json | Output::Wide => self.whole(object, out)?,
        }
        Ok(())
    }

    /// Prints all of a list.
    pub(crate) fn list(
        &mut self,
        found: Vec<(&Kind, Value)>,
        out: &mut dyn Write,
    ) -> anyhow::Result<()> {
        if self.form == Output::Name {
            return found.iter().try_for_each(|(kind, object)| self.one(kind, object, out));
        }
        let items: Vec<_> = found.into_iter().map(|(_, object)| object).collect();
        if let Output::Columns(_) = self.form {
            return self.rows(&items, out);
        }
        let list = json!({"apiVersion": "v1", "kind": "List", "items": items,
                          "metadata": {"resourceVersion": ""}});
        match &self.form {
            Output::JsonPath(template) => Ok(write!(out, "{}", template.print(&list))?),
            _ => self.whole(&list, out),
        }
    }

    fn rows(&mut self, objects: &[Value], out: &mut dyn Write) -> anyhow::Result<()> {
        let Output::Columns(wanted) = &self.form else {
            return Ok(());
        };
        let columns: Vec<Column> =
            wanted.iter().map(|(name, _)| Column { name: name.clone(), priority: 0 }).collect();
        let rows: Vec<Row> = objects
            .iter()
            .map(|object| Row {
                cells: wanted.iter().map(|(_, path)| column_cell(path, object)).collect(),
                object: Value::Null,
            })
            .collect();
        let style = Style { header: self.header, ..Style::default() };
        let printer = self.columns.get_or_insert_with(|| Printer::new(&columns, style));
        Ok(printer.print(out, &columns, &rows)?)
    }

    fn whole(&self, value: &Value, out: &mut dyn Write) -> anyhow::Result<()> {
        let mut value = value.clone();
        if !self.managers {
            hide_managers(&mut value);
        }
        write_value(&self.form, value, out)
    }
}

fn column_cell(path: &JsonPath, object: &Value) -> Value {
    let found: Vec<_> = path.all(object).into_iter().map(plain).collect();
    Value::String(if found.is_empty() { "<none>".to_owned() } else { found.join(",") })
}

/// As YAML where that is the form, else as JSON.
pub(crate) fn write_value(
    form: &Output,
    mut value: Value,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    // kubectl prints fields by name, whatever their order on the wire.
    value.sort_all_objects();
    if *form == Output::Yaml {
        write!(out, "{}", exo_crds::yaml::to_string(&value)?)?;
        return Ok(());
    }
    // Pretty, as kubectl prints it, but with its indentation of four.
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut *out, formatter);
    serde::Serialize::serialize(&value, &mut serializer)?;
    writeln!(out)?;
    Ok(())
}

/// Which client is responsible for which field is of no interest to people; kubectl hides it too.
pub(crate) fn hide_managers(value: &mut Value) {
    if let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("managedFields");
    }
    if let Some(Value::Array(items)) = value.get_mut("items") {
        items.iter_mut().for_each(hide_managers);
    }
}
