//! The kinds that a server knows, and what people call them.

use std::fmt;

use exo_crds::GROUP;
use k8s_openapi::{
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
    apimachinery::pkg::apis::meta::v1::APIResource,
};
use kube::core::ApiResource;

/// A kind of resource, as discovery describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Kind {
    pub(crate) api: ApiResource,
    pub(crate) singular: String,
    pub(crate) namespaced: bool,
    /// There are objects of it; others are mere questions.
    has_list: bool,
    short_names: Vec<String>,
    /// Words for several kinds together, such as `all`.
    categories: Vec<String>,
}

/// All of them.
#[derive(Clone, Debug)]
pub(crate) struct Kinds {
    kinds: Vec<Kind>,
    /// Who knows no others, for messages.
    whose: Whose,
}

/// Whose kinds they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whose {
    Server,
    Exoctl,
}

impl fmt::Display for Whose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Server => "the server has",
            Self::Exoctl => "without a server, exoctl knows",
        })
    }
}

/// A word that names no kind.
#[derive(Debug, thiserror::Error)]
#[error("{whose} no resource type `{word}`{}", or_else(.suggestion.as_deref(), .known))]
pub(crate) struct UnknownKind {
    whose: Whose,
    word: String,
    suggestion: Option<String>,
    /// What there is.
    known: String,
}

impl UnknownKind {
    /// The same, now that it is known what was meant.
    pub(crate) fn meaning(self, suggestion: String) -> Self {
        Self { suggestion: Some(suggestion), ..self }
    }
}

/// What was meant, else all that may have been.
fn or_else(suggestion: Option<&str>, known: &str) -> String {
    match suggestion {
        None if known.is_empty() => String::new(),
        None => format!("; there are {known}"),
        suggestion => did_you_mean(suggestion),
    }
}

/// The end of a message, when there is something to suggest.
pub(crate) fn did_you_mean(suggestion: Option<&str>) -> String {
    suggestion.map_or_else(String::new, |s| format!("; did you mean `{s}`?"))
}

impl Kind {
    /// As a definition says; of the version that it calls `version`.
    fn defined(crd: &CustomResourceDefinition, version: &str) -> Self {
        let (group, names) = (&crd.spec.group, &crd.spec.names);
        Self {
            api: ApiResource {
                group: group.clone(),
                version: version.to_owned(),
                api_version: format!("{group}/{version}"),
                kind: names.kind.clone(),
                plural: names.plural.clone(),
            },
            singular: names.singular.clone().unwrap_or_else(|| names.kind.to_lowercase()),
            namespaced: crd.spec.scope == "Namespaced",
            has_list: true,
            short_names: names.short_names.clone().unwrap_or_default(),
            categories: names.categories.clone().unwrap_or_default(),
        }
    }

    /// `None` for subresources.
    pub(crate) fn discovered(group: &str, version: &str, resource: APIResource) -> Option<Self> {
        if resource.name.contains('/') {
            return None;
        }
        let api_version = match group {
            "" => version.to_owned(),
            group => format!("{group}/{version}"),
        };
        let singular = match resource.singular_name.is_empty() {
            true => resource.kind.to_lowercase(),
            false => resource.singular_name,
        };
        Some(Self {
            api: ApiResource {
                group: group.to_owned(),
                version: version.to_owned(),
                api_version,
                kind: resource.kind,
                plural: resource.name,
            },
            singular,
            namespaced: resource.namespaced,
            has_list: resource.verbs.iter().any(|verb| verb == "list"),
            short_names: resource.short_names.unwrap_or_default(),
            categories: resource.categories.unwrap_or_default(),
        })
    }

    /// As results are printed: `inferenceinstance.exo.dev/llama`.
    pub(crate) fn named(&self, name: &str) -> String {
        match self.api.group.as_str() {
            "" => format!("{}/{name}", self.singular),
            group => format!("{}.{group}/{name}", self.singular),
        }
    }

    /// URL path of one object, or of all in a namespace (or everywhere).
    pub(crate) fn path(&self, namespace: Option<&str>, name: Option<&str>) -> String {
        let root = match self.api.group.as_str() {
            "" => "/api",
            _ => "/apis",
        };
        let mut path = format!("{root}/{}", self.api.api_version);
        if let Some(namespace) = namespace.filter(|_| self.namespaced) {
            path = format!("{path}/namespaces/{namespace}");
        }
        path = format!("{path}/{}", self.api.plural);
        name.map_or(path.clone(), |name| format!("{path}/{name}"))
    }

    /// What people would call several of them: the plural, and short names that aren't initials.
    pub(crate) fn words(&self) -> impl Iterator<Item = &str> {
        let short = self.short_names.iter().map(String::as_str).filter(|name| name.len() > 2);
        [self.api.plural.as_str()].into_iter().chain(short.filter(|name| name.ends_with('s')))
    }

    pub(crate) fn short_names(&self) -> &[String] {
        &self.short_names
    }

    /// What people call several of them.
    pub(crate) fn word(&self) -> &str {
        self.words().last().unwrap_or(&self.api.plural)
    }

    /// What people call one of them: `instance`.
    pub(crate) fn spoken(&self) -> &str {
        let one = self.word().strip_suffix('s').unwrap_or_default();
        self.names().find(|name| *name == one).unwrap_or(&self.singular)
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        [self.api.plural.as_str(), self.singular.as_str()]
            .into_iter()
            .chain(self.short_names.iter().map(String::as_str))
    }
}

impl Kinds {
    /// Our own group comes first: `nodes` are exo's even on a Kubernetes server. Then the core group:
    /// what is there under two names, such as events, is best known by that one.
    pub(crate) fn new(mut kinds: Vec<Kind>) -> Self {
        kinds.sort_by_key(|kind| match kind.api.group.as_str() {
            GROUP => 0,
            "" => 1,
            _ => 2,
        });
        Self { kinds, whose: Whose::Server }
    }

    /// Those that this exoctl was built with: `exo.dev`'s own.
    pub(crate) fn built_in() -> Self {
        let crds = exo_crds::all();
        let kinds = crds
            .iter()
            .flat_map(|crd| crd.spec.versions.iter().map(|v| Kind::defined(crd, &v.name)))
            .collect();
        Self { kinds, whose: Whose::Exoctl }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Kind> {
        self.kinds.iter()
    }

    /// What there is, in the words that people use.
    pub(crate) fn listed(&self) -> String {
        let mut words: Vec<&str> = Vec::new();
        for word in self.kinds.iter().filter(|kind| kind.has_list).map(Kind::word) {
            if !words.contains(&word) {
                words.push(word);
            }
        }
        words.join(", ")
    }

    /// By plural, singular, short name or kind in any case, optionally followed by `.group`.
    pub(crate) fn find(&self, word: &str) -> Result<&Kind, UnknownKind> {
        let lower = word.to_lowercase();
        let (name, group) = match lower.split_once('.') {
            Some((name, group)) => (name, Some(group)),
            None => (lower.as_str(), None),
        };
        let is_it = |kind: &&Kind| {
            let in_group = group.is_none_or(|group| kind.api.group == group);
            let named = kind.names().any(|n| n == name) || kind.api.kind.to_lowercase() == name;
            in_group && named
        };
        self.kinds.iter().find(is_it).ok_or_else(|| UnknownKind {
            whose: self.whose,
            word: word.to_owned(),
            suggestion: self.suggest(name),
            known: self.listed(),
        })
    }

    /// The kinds of a category; none where it is no such word.
    pub(crate) fn of_category(&self, word: &str) -> Vec<&Kind> {
        let word = word.to_lowercase();
        self.kinds.iter().filter(|kind| kind.categories.contains(&word)).collect()
    }

    /// By a document's own `apiVersion` and `kind`.
    pub(crate) fn find_exact(&self, api_version: &str, kind: &str) -> Result<&Kind, UnknownKind> {
        let is_it = |k: &&Kind| k.api.api_version == api_version && k.api.kind == kind;
        self.kinds.iter().find(is_it).ok_or_else(|| {
            let kinds = self.kinds.iter().map(|k| k.api.kind.as_str());
            let of_kind = self.kinds.iter().find(|k| k.api.kind == kind);
            UnknownKind {
                whose: self.whose,
                word: format!("{api_version} {kind}"),
                suggestion: match of_kind {
                    Some(known) => Some(format!("{} {kind}", known.api.api_version)),
                    None => closest(kind, kinds).map(str::to_owned),
                },
                known: String::new(),
            }
        })
    }

    fn suggest(&self, word: &str) -> Option<String> {
        let names = self.kinds.iter().flat_map(Kind::names);
        closest(word, names).map(str::to_owned)
    }
}

/// The candidate that `word` is most likely a misspelling of.
pub(crate) fn closest<'a>(
    word: &str,
    candidates: impl Iterator<Item = &'a str>,
) -> Option<&'a str> {
    // A third of the letters wrong is another word.
    let limit = (word.chars().count() / 3).clamp(1, 3);
    candidates
        .map(|candidate| (edits(word, candidate), candidate))
        .filter(|(edits, _)| *edits <= limit)
        .min()
        .map(|(_, candidate)| candidate)
}

/// Insertions, deletions, replacements and swaps of neighbours that lead from `a` to `b`.
fn edits(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for (i, row) in rows.iter_mut().enumerate() {
        row[0] = i;
    }
    rows[0] = (0..=b.len()).collect();
    for i in 1..=a.len() {
        for j in 1..=b.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replaced.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            rows[i][j] = best;
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;

    fn kind(group: &str, kind: &str, plural: &str, short: &[&str], namespaced: bool) -> Kind {
        let resource =
            serde_json::from_value(json!({"name": plural, "kind": kind, "verbs": ["list"],
            "singularName": kind.to_lowercase(), "namespaced": namespaced, "shortNames": short}))
            .unwrap();
        let version = if group.is_empty() { "v1" } else { "v1alpha1" };
        Kind::discovered(group, version, resource).unwrap()
    }

    pub(crate) fn some_kinds() -> Kinds {
        Kinds::new(vec![
            kind("", "Node", "nodes", &["no"], false),
            kind(GROUP, "Node", "nodes", &[], false),
            kind(GROUP, "Shard", "shards", &[], true),
            kind(GROUP, "InferenceInstance", "inferenceinstances", &["ii", "instances"], true),
        ])
    }

    #[test]
    fn finds_kinds_by_everything_they_are_called() {
        let kinds = some_kinds();
        let check = |word: &str, expect: &str| {
            assert_eq!(kinds.find(word).unwrap().named("x"), expect, "{word}");
        };
        check("shards", "shard.exo.dev/x");
        check("Shard", "shard.exo.dev/x");
        check("ii", "inferenceinstance.exo.dev/x");
        check("InferenceInstances", "inferenceinstance.exo.dev/x");
        check("nodes", "node.exo.dev/x");
        check("nodes.exo.dev", "node.exo.dev/x");
        check("no", "node/x");
    }

    #[test]
    fn suggests_what_was_meant() {
        let kinds = some_kinds();
        let error = |word: &str| kinds.find(word).unwrap_err().to_string();
        assert_eq!(
            error("sahrds"),
            "the server has no resource type `sahrds`; did you mean `shards`?"
        );
        assert!(error("instnaces").ends_with("did you mean `instances`?"));
        assert_eq!(
            error("pods"),
            "the server has no resource type `pods`; there are nodes, shards, instances"
        );
        let exact =
            |version: &str, kind: &str| kinds.find_exact(version, kind).unwrap_err().to_string();
        assert!(exact("exo.dev/v1alpha1", "Shrad").ends_with("did you mean `Shard`?"));
        assert!(exact("exo.dev/v1", "Shard").ends_with("did you mean `exo.dev/v1alpha1 Shard`?"));
    }

    #[test]
    fn built_in_kinds_are_exos_own() {
        let kinds = Kinds::built_in();
        let instance = kinds.find_exact("exo.dev/v1alpha1", "InferenceInstance").unwrap();
        assert_eq!(instance.named("a"), "inferenceinstance.exo.dev/a");
        assert!(instance.namespaced);
        assert!(!kinds.find("model").unwrap().namespaced);
        let error = kinds.find_exact("v1", "Secret").unwrap_err().to_string();
        assert_eq!(error, "without a server, exoctl knows no resource type `v1 Secret`");
    }

    #[test]
    fn one_of_a_kind_has_a_name() {
        let check = |kinds: &Kinds, word: &str, expect: &str| {
            assert_eq!(kinds.find(word).unwrap().spoken(), expect, "{word}");
        };
        check(&Kinds::built_in(), "ii", "instance");
        check(&Kinds::built_in(), "shards", "shard");
        check(&some_kinds(), "ii", "inferenceinstance");
    }

    #[test]
    fn paths_follow_scope_and_group() {
        let kinds = some_kinds();
        let shard = kinds.find("shard").unwrap();
        assert_eq!(shard.path(None, None), "/apis/exo.dev/v1alpha1/shards");
        assert_eq!(
            shard.path(Some("team"), Some("a")),
            "/apis/exo.dev/v1alpha1/namespaces/team/shards/a"
        );
        let node = kinds.find("no").unwrap();
        assert_eq!(node.path(Some("team"), Some("a")), "/api/v1/nodes/a");
    }
}
