//! What a request has got so far, so that it can go on elsewhere.
//!
//! A runner's text is a function of the tokens alone: text that it holds back after a token (half
//! a character, the beginning of a stop text) comes with a later one. A resumed request carries
//! all tokens received; the next runner works out what they said, keeps silent about it, and goes
//! on with what follows. So every event may be passed on as it comes, and nothing is said twice.

use exo_crds::generate::{GenerateEvent, GenerateRequest};

/// A request that breaks this often at the same token is given up: it may be what kills runners,
/// and every break costs all the others on that replica a restart.
const MAX_SUSPECT_BREAKS: u32 = 3;

/// The state; one per request.
#[derive(Clone, Debug)]
pub(crate) struct Progress {
    request: GenerateRequest,
    started: bool,
    suspect_breaks: u32,
}

impl Progress {
    pub(crate) fn new(request: GenerateRequest) -> Self {
        Self { request, started: false, suspect_breaks: 0 }
    }

    /// What to ask of the next runner.
    pub(crate) fn request(&self) -> &GenerateRequest {
        &self.request
    }

    /// Whether the client has been told that its answer begins.
    pub(crate) fn started(&self) -> bool {
        self.started
    }

    /// Takes a runner's event; `None` when the client already knows it.
    pub(crate) fn accept(&mut self, event: GenerateEvent) -> Option<GenerateEvent> {
        match &event {
            GenerateEvent::Start { .. } => {
                if std::mem::replace(&mut self.started, true) {
                    return None;
                }
            }
            GenerateEvent::Token { id, .. } => {
                self.request.generated.push(*id);
                self.suspect_breaks = 0;
            }
            GenerateEvent::End { .. } | GenerateEvent::Error { .. } => {}
        }
        Some(event)
    }

    /// Notes a break that the request may have caused; false when that's enough of them.
    pub(crate) fn may_try_again(&mut self) -> bool {
        self.suspect_breaks += 1;
        self.suspect_breaks < MAX_SUSPECT_BREAKS
    }
}

#[cfg(test)]
mod tests {
    use exo_crds::generate::{Prompt, SamplingParams};

    use super::*;
    use crate::openai::chat::tests::{start, token};

    fn progress() -> Progress {
        Progress::new(GenerateRequest {
            id: "chatcmpl-1".into(),
            prompt: Prompt::Text("x".into()),
            generated: Vec::new(),
            max_tokens: None,
            sampling: SamplingParams::default(),
            stop: Vec::new(),
            logprobs: None,
            now: 0,
        })
    }

    #[test]
    fn a_resumed_request_carries_its_tokens_and_starts_once() {
        let mut progress = progress();
        assert_eq!(progress.accept(start(3)), Some(start(3)));
        assert!(progress.accept(token(7, "a")).is_some());
        assert!(progress.accept(token(8, "")).is_some());
        assert_eq!(progress.request().generated, [7, 8]);
        assert_eq!(progress.accept(start(3)), None);
        assert!(progress.accept(token(9, "b")).is_some());
        assert_eq!(progress.request().generated, [7, 8, 9]);
    }

    #[test]
    fn only_breaks_at_the_same_token_add_up() {
        let mut progress = progress();
        assert!(progress.may_try_again() && progress.may_try_again());
        progress.accept(token(1, ""));
        assert!(progress.may_try_again() && progress.may_try_again());
        assert!(!progress.may_try_again());
    }
}
