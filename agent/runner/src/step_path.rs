//! What people and scripts are told of how a rank runs steps of one sequence. The engine decides it.

use exo_engine::StepPath;
use serde::Serialize;

/// As `--json` has it.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(crate) struct StepPathReport {
    /// Layers of this rank that use kernels of our own.
    own_kernels_layers: usize,
    /// Why none does.
    reason: Option<String>,
    /// Whether they should have been used here: the reason is a fault then.
    fallback: bool,
}

impl From<&StepPath> for StepPathReport {
    fn from(path: &StepPath) -> Self {
        let (own_kernels_layers, reason) = match path {
            StepPath::Kernels { layers } => (*layers, None),
            StepPath::Operations(reason) => (0, Some(reason.to_string())),
        };
        Self { own_kernels_layers, reason, fallback: path.fallback().is_some() }
    }
}

/// Complains on stderr, on any rank, where steps take another way than they should.
pub(crate) fn complain(path: &StepPath, rank: usize) {
    if let Some(reason) = path.fallback() {
        eprintln!(
            "warning: rank {rank} decodes without kernels of our own, which is slower: {reason}"
        );
    }
}

#[cfg(test)]
mod tests {
    use exo_engine::NoKernels;
    use serde_json::json;

    use super::*;

    #[test]
    fn scripts_see_which_way_steps_go_and_why() {
        for (path, expect) in [
            (
                StepPath::Kernels { layers: 16 },
                json!({"own_kernels_layers": 16, "reason": null, "fallback": false}),
            ),
            (
                StepPath::Operations(NoKernels::NotFor("experts")),
                json!({"own_kernels_layers": 0, "reason": "they are not made for experts",
                    "fallback": false}),
            ),
            (
                StepPath::Operations(NoKernels::Differ { off: 0.5, size: 1.0, change: 0.25 }),
                json!({"own_kernels_layers": 0, "reason": "on this GPU they are off by 5e-1 behind \
                    the first layer, where the largest number is 1e0 and the layer changes it by \
                    up to 2.5e-1", "fallback": true}),
            ),
        ] {
            let report = StepPathReport::from(&path);
            assert_eq!(serde_json::to_value(&report).unwrap(), expect);
        }
    }
}
