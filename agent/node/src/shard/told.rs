//! What is told about a shard as it enters a phase, as events.

use exo_crds::{Shard, ShardPhase, event::Occurrence};

use super::{Local, Stage};

impl Local {
    /// The event of the present phase; none of `Pending`, in which nothing has happened yet.
    pub(crate) fn occurrence(&self, shard: &Shard) -> Option<Occurrence> {
        let spec = &shard.spec;
        let rank = format!("rank {} of {}", spec.rank, spec.world_size);
        Some(match &self.stage {
            Stage::New | Stage::Located(_) => return None,
            Stage::Listening(dir) => {
                let note = format!("the weights are in {}", dir.display());
                Occurrence::normal("Downloaded", note)
            }
            Stage::Running(phase) => match phase {
                ShardPhase::Connecting => {
                    Occurrence::normal("Connecting", format!("started the runner of {rank}"))
                }
                ShardPhase::Loading => {
                    let note = format!("loading layers {} of {}", spec.layers, spec.model.name);
                    Occurrence::normal("Loading", note)
                }
                ShardPhase::Warming => Occurrence::normal("Warming", "the weights are loaded"),
                ShardPhase::Ready => {
                    Occurrence::normal("Ready", format!("{rank} takes part in serving"))
                }
                ShardPhase::Pending
                | ShardPhase::Downloading
                | ShardPhase::Downloaded
                | ShardPhase::Stopping
                | ShardPhase::Failed => return None,
            },
            Stage::Stopped => Occurrence::normal("Stopped", "the runner was stopped"),
            Stage::Failed(failure) => Occurrence::warning(&failure.reason, &failure.message),
        })
    }
}

#[cfg(test)]
mod tests {
    use exo_crds::runner::RunnerEvent;

    use super::*;
    use crate::shard::{Exit, tests};

    #[test]
    fn every_phase_but_the_first_is_told() {
        let shard = tests::shard("s");
        let mut local = Local::begin(&shard);
        assert_eq!(local.occurrence(&shard), None);
        local.located("/m".into());
        local.reserved(tests::listen());
        let reason = |local: &Local| local.occurrence(&shard).unwrap().reason;
        assert_eq!(
            local.occurrence(&shard),
            Some(Occurrence::normal("Downloaded", "the weights are in /m"))
        );
        local.spawned();
        assert_eq!(reason(&local), "Connecting");
        for (phase, expect) in [
            (ShardPhase::Loading, "Loading"),
            (ShardPhase::Warming, "Warming"),
            (ShardPhase::Ready, "Ready"),
        ] {
            local.said(RunnerEvent::Phase { phase, progress_percent: 1 });
            assert_eq!(reason(&local), expect);
        }
        local.exited(Exit { code: Some(1), ..Exit::default() });
        assert_eq!(
            local.occurrence(&shard),
            Some(Occurrence::warning("RunnerExited", "the runner ended with status 1"))
        );
    }
}
