//! Which objects a command is about: `KIND`, `KIND NAME…`, `KIND/NAME…`, `KIND,KIND`.

use anyhow::bail;
use serde_json::Value;

use crate::{
    cli::Select,
    kinds::{Kind, Kinds},
    server::{Form, Server},
};

/// Whose objects are called by their names alone, the likeliest first.
const LIKELY_KINDS: [&str; 4] = ["instances", "shards", "nodes", "models"];

/// One object of a cluster.
#[derive(Clone, Debug)]
pub(super) struct Found<'s> {
    pub(super) kind: &'s Kind,
    pub(super) namespace: String,
    pub(super) name: String,
}

impl Found<'_> {
    pub(super) fn path(&self) -> String {
        self.kind.path(Some(&self.namespace), Some(&self.name))
    }

    /// As results are printed: `inferenceinstance.exo.dev/llama`.
    pub(super) fn named(&self) -> String {
        self.kind.named(&self.name)
    }
}

/// The objects that a command changes: those named, or those of the kind that a rule finds: a
/// selector, or `true` for all. Without `rule` the command takes names only.
///
/// # Errors
/// When neither names nor the rule say which.
pub(super) async fn found<'s>(
    server: &'s Server,
    words: (&str, &[String]),
    rule: Option<(&Select, bool)>,
) -> anyhow::Result<Vec<Found<'s>>> {
    let mut found = Vec::new();
    let none = Select::default();
    let (select, all) = rule.unwrap_or((&none, false));
    for Selected { kind, names } in read(server, words.0, words.1).await? {
        let by_rule = all || select.labels.is_some() || select.fields.is_some();
        if names.is_empty() && !by_rule {
            let or = if rule.is_some() { ", -l SELECTOR or --all" } else { "" };
            bail!("say which {}: names{or}", kind.api.plural);
        }
        if !names.is_empty() && (by_rule || select.all_namespaces) {
            bail!("names go with neither a selector, --all nor --all-namespaces");
        }
        if names.is_empty() {
            let items = list(server, kind, select).await?;
            if items.is_empty() {
                eprintln!("{}", nothing_found(kind, select, server));
            }
            found.extend(items.iter().map(|item| of_object(server, kind, item)));
        }
        let namespace = server.namespace().to_owned();
        found.extend(names.into_iter().map(|name| Found {
            kind,
            namespace: namespace.clone(),
            name,
        }));
    }
    Ok(found)
}

/// Where an object of a list is.
pub(super) fn of_object<'s>(server: &Server, kind: &'s Kind, object: &Value) -> Found<'s> {
    let text = |field: &str| object["metadata"][field].as_str().map(str::to_owned);
    Found {
        kind,
        namespace: text("namespace").unwrap_or_else(|| server.namespace().to_owned()),
        name: text("name").unwrap_or_default(),
    }
}

/// One kind and the names asked for; all of them when there are none.
#[derive(Clone, Debug)]
pub(super) struct Selected<'s> {
    pub(super) kind: &'s Kind,
    pub(super) names: Vec<String>,
}

/// Reads the words after a command, kinds in the order in which they came.
pub(super) async fn read<'s>(
    server: &'s Server,
    first: &str,
    rest: &[String],
) -> anyhow::Result<Vec<Selected<'s>>> {
    let mut selected: Vec<Selected<'_>> = Vec::new();
    if first.contains('/') {
        for word in std::iter::once(first).chain(rest.iter().map(String::as_str)) {
            let Some((kind, name)) = word.split_once('/') else {
                bail!("`{word}` must be KIND/NAME like the others");
            };
            let kind = server.kinds().await?.find(kind)?;
            let name = checked(name)?;
            match selected.iter_mut().find(|s| s.kind == kind) {
                Some(same) => same.names.push(name),
                None => selected.push(Selected { kind, names: vec![name] }),
            }
        }
        return Ok(selected);
    }
    let kinds = server.kinds().await?;
    for word in first.split(',') {
        let found = match kinds.find(word) {
            Ok(kind) => vec![kind],
            Err(unknown) => match kinds.of_category(word) {
                several if several.is_empty() => {
                    return Err(match object_named(server, kinds, word).await {
                        Some(object) => unknown.meaning(object).into(),
                        None => unknown.into(),
                    });
                }
                several if rest.is_empty() => several,
                _ => bail!("`{word}` stands for several kinds: names go with one"),
            },
        };
        for kind in found {
            let names = rest.iter().map(|name| checked(name)).collect::<Result<_, _>>()?;
            selected.push(Selected { kind, names });
        }
    }
    Ok(selected)
}

/// `instance tiny`, where a word in a kind's place is the name of an object that is there: the kind
/// was left out.
async fn object_named(server: &Server, kinds: &Kinds, name: &str) -> Option<String> {
    let name = checked(name).ok()?;
    for kind in LIKELY_KINDS.iter().filter_map(|kind| kinds.find(kind).ok()) {
        let path = kind.path(Some(server.namespace()), Some(&name));
        // One that can't find out would say the same of all.
        if server.get_if_exists(&path).await.ok()?.is_some() {
            return Some(format!("{} {name}", kind.spoken()));
        }
    }
    None
}

/// Names end up in URLs; a wrong one must not reach another path.
pub(super) fn checked(name: &str) -> anyhow::Result<String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_' | ':');
    match !name.is_empty() && name != "." && name != ".." && name.chars().all(allowed) {
        true => Ok(name.to_owned()),
        false => bail!("`{name}` is not a name"),
    }
}

impl Select {
    /// Whether anything was said that goes with no names.
    pub(super) fn is_given(&self) -> bool {
        self.labels.is_some() || self.fields.is_some() || self.all_namespaces
    }

    /// The namespace that a list is about; `None` for all.
    pub(super) fn namespace<'s>(&self, server: &'s Server) -> Option<&'s str> {
        (!self.all_namespaces).then(|| server.namespace())
    }

    pub(super) fn query(&self) -> Vec<(&str, &str)> {
        let labels = self.labels.as_deref().map(|l| ("labelSelector", l));
        let fields = self.fields.as_deref().map(|f| ("fieldSelector", f));
        labels.into_iter().chain(fields).collect()
    }
}

/// Objects of a list in full; items of lists don't say what they are, so that is added.
pub(super) async fn list(
    server: &Server,
    kind: &Kind,
    select: &Select,
) -> anyhow::Result<Vec<Value>> {
    list_with(server, kind, select, &select.query()).await
}

/// The same with parameters of the caller's.
pub(super) async fn list_with(
    server: &Server,
    kind: &Kind,
    select: &Select,
    query: &[(&str, &str)],
) -> anyhow::Result<Vec<Value>> {
    let path = kind.path(select.namespace(server), None);
    let mut list: Value = server.get(&path, query, Form::Json).await?;
    Ok(take_items(&mut list, kind))
}

/// The items of a list, each with its `apiVersion` and `kind`.
pub(super) fn take_items(list: &mut Value, kind: &Kind) -> Vec<Value> {
    let mut items = match list["items"].take() {
        Value::Array(items) => items,
        _ => Vec::new(),
    };
    for item in items.iter_mut().filter(|item| item.is_object()) {
        item["apiVersion"] = kind.api.api_version.as_str().into();
        item["kind"] = kind.api.kind.as_str().into();
    }
    items
}

/// What a command says when there is nothing to show.
pub(super) fn nothing_found(kind: &Kind, select: &Select, server: &Server) -> String {
    match select.namespace(server).filter(|_| kind.namespaced) {
        Some(namespace) => format!("No resources found in {namespace} namespace."),
        None => "No resources found".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_can_not_leave_their_path() {
        for good in ["llama-0-a1-0", "studio.local", "a_b:c"] {
            assert!(checked(good).is_ok(), "{good}");
        }
        for bad in ["", "a/b", "..", "a b", "a?x=1", "é", "a%2fb"] {
            assert!(checked(bad).is_err(), "{bad}");
        }
    }
}
