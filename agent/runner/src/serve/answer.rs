//! One answer on its way out: tokens become text, and it is decided where the answer ends. Pure but
//! for the tokenizer; never decides what runs next.

use std::sync::Arc;

use exo_crds::generate::{FinishReason, GenerateEvent, TokenLogprobs, TopLogprob};
use exo_engine::{
    StepOutput,
    text::{Detokenizer, StopMatcher, Stopped, TextError, Tokenizer},
};

/// What an answer is made of, fixed when the request is accepted.
#[derive(Debug)]
pub(crate) struct AnswerSpec {
    /// Tokens just before the answer, when its first word may join them; else empty.
    pub(crate) before: Vec<u32>,
    /// Tokens that the client has already.
    pub(crate) generated: Vec<u32>,
    /// Most tokens of the answer, `generated` included.
    pub(crate) tokens_max: u32,
    pub(crate) stops: Vec<String>,
    pub(crate) logprobs: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Answer {
    tokenizer: Arc<Tokenizer>,
    eos_token_ids: Arc<[u32]>,
    detokenizer: Detokenizer,
    stops: StopMatcher,
    tokens: u32,
    tokens_max: u32,
    logprobs: bool,
}

/// How an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ending {
    pub(crate) reason: FinishReason,
    /// Text held back until now.
    pub(crate) text: String,
    /// Tokens of the whole answer.
    pub(crate) tokens: u32,
}

/// What one token brings.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Pushed {
    /// None for the token that ends a sequence: it is not part of the answer.
    pub(crate) event: Option<GenerateEvent>,
    pub(crate) ending: Option<Ending>,
}

impl Answer {
    /// Goes through the tokens that the client has, so that the next text fits theirs. The ending
    /// is given when they are the whole answer.
    pub(crate) fn new(
        tokenizer: Arc<Tokenizer>,
        eos_token_ids: Arc<[u32]>,
        spec: &AnswerSpec,
    ) -> Result<(Self, Option<Ending>), TextError> {
        let detokenizer = Detokenizer::after(&tokenizer, &spec.before)?;
        let mut answer = Self {
            tokenizer,
            eos_token_ids,
            detokenizer,
            stops: StopMatcher::new(spec.stops.iter().cloned()),
            tokens: 0,
            tokens_max: spec.tokens_max,
            logprobs: spec.logprobs,
        };
        if spec.tokens_max == 0 {
            let ending = answer.end(FinishReason::Length)?;
            return Ok((answer, Some(ending)));
        }
        for &token in &spec.generated {
            let output = StepOutput { token, logprob: None, top: Vec::new() };
            if let Some(ending) = answer.push(&output)?.ending {
                return Ok((answer, Some(ending)));
            }
        }
        Ok((answer, None))
    }

    /// How many more tokens it may have.
    pub(crate) fn tokens_left(&self) -> u32 {
        self.tokens_max.saturating_sub(self.tokens)
    }

    /// Takes the next token.
    pub(crate) fn push(&mut self, output: &StepOutput) -> Result<Pushed, TextError> {
        if self.eos_token_ids.contains(&output.token) {
            let ending = self.end(FinishReason::Stop)?;
            return Ok(Pushed { event: None, ending: Some(ending) });
        }
        self.tokens += 1;
        let text = self.detokenizer.push(&self.tokenizer, output.token)?;
        let (text, ending) = match self.stops.push(&text) {
            Stopped::Yes(text) => {
                let ending =
                    Ending { reason: FinishReason::Stop, text: String::new(), tokens: self.tokens };
                (text, Some(ending))
            }
            Stopped::No(text) if self.tokens >= self.tokens_max => {
                (text, Some(self.end(FinishReason::Length)?))
            }
            Stopped::No(text) => (text, None),
        };
        let logprobs = match (self.logprobs, output.logprob) {
            (true, Some(logprob)) => Some(self.logprobs_of(output, logprob)?),
            _ => None,
        };
        let event = GenerateEvent::Token { id: output.token, text, logprobs };
        Ok(Pushed { event: Some(event), ending })
    }

    /// Gives out what is held back; a stop text may still be completed by it.
    fn end(&mut self, reason: FinishReason) -> Result<Ending, TextError> {
        let rest = self.detokenizer.finish(&self.tokenizer)?;
        let (text, reason) = match self.stops.push(&rest) {
            Stopped::Yes(text) => (text, FinishReason::Stop),
            Stopped::No(text) => (text + &self.stops.finish(), reason),
        };
        Ok(Ending { reason, text, tokens: self.tokens })
    }

    fn logprobs_of(&self, output: &StepOutput, logprob: f32) -> Result<TokenLogprobs, TextError> {
        let top = (output.top.iter())
            .map(|&(id, logprob)| {
                Ok(TopLogprob { id, text: self.tokenizer.token_text(id)?, logprob })
            })
            .collect::<Result<_, TextError>>()?;
        let text = self.tokenizer.token_text(output.token)?;
        Ok(TokenLogprobs { logprob, text, top })
    }
}

#[cfg(test)]
mod tests {
    use super::{super::samples, *};

    fn spec() -> AnswerSpec {
        AnswerSpec {
            before: Vec::new(),
            generated: Vec::new(),
            tokens_max: 100,
            stops: Vec::new(),
            logprobs: false,
        }
    }

    fn new(spec: &AnswerSpec) -> (Answer, Option<Ending>) {
        Answer::new(samples::tokenizer(), samples::EOS.into(), spec).unwrap()
    }

    fn output(token: u32) -> StepOutput {
        StepOutput { token, logprob: Some(-0.5), top: vec![(token, -0.5), (b'x'.into(), -2.0)] }
    }

    /// The texts of the tokens of `text` until the ending.
    fn run(answer: &mut Answer, text: &[u8]) -> (Vec<String>, Option<Ending>) {
        let mut texts = Vec::new();
        for byte in text {
            let pushed = answer.push(&output(u32::from(*byte))).unwrap();
            if let Some(GenerateEvent::Token { text, .. }) = pushed.event {
                texts.push(text);
            }
            if pushed.ending.is_some() {
                return (texts, pushed.ending);
            }
        }
        (texts, None)
    }

    fn ending(reason: FinishReason, text: &str, tokens: u32) -> Option<Ending> {
        Some(Ending { reason, text: text.to_owned(), tokens })
    }

    #[test]
    fn ends_with_the_token_for_it() {
        let (mut answer, _) = new(&spec());
        assert_eq!(run(&mut answer, b"ab").0, ["a", "b"]);
        let pushed = answer.push(&output(samples::EOS[0])).unwrap();
        assert_eq!(pushed, Pushed { event: None, ending: ending(FinishReason::Stop, "", 2) });
    }

    #[test]
    fn ends_at_its_length_with_what_was_held_back() {
        let (mut answer, _) =
            new(&AnswerSpec { tokens_max: 3, stops: vec!["bcd".to_owned()], ..spec() });
        let (texts, end) = run(&mut answer, b"abcx");
        assert_eq!(texts, ["a", "", ""]);
        assert_eq!(end, ending(FinishReason::Length, "bc", 3));
    }

    #[test]
    fn ends_before_a_stop() {
        let (mut answer, _) = new(&AnswerSpec { stops: vec!["bc".to_owned()], ..spec() });
        let (texts, end) = run(&mut answer, b"abcx");
        assert_eq!(texts, ["a", "", ""]);
        assert_eq!(end, ending(FinishReason::Stop, "", 3));
    }

    #[test]
    fn half_a_character_shows_only_at_the_end() {
        let (mut answer, _) = new(&AnswerSpec { tokens_max: 3, ..spec() });
        let (texts, end) = run(&mut answer, "é鹭".as_bytes());
        assert_eq!(texts, ["", "é", ""]);
        assert_eq!(end, ending(FinishReason::Length, "\u{FFFD}", 3));
    }

    #[test]
    fn a_resumed_answer_goes_on_where_it_broke_off() {
        let text = "héé END x".as_bytes();
        let full = AnswerSpec { stops: vec![" END".to_owned()], ..spec() };
        let (mut whole, _) = new(&full);
        let (texts, end) = run(&mut whole, text);
        for cut in 0..texts.len() {
            let generated = text[..cut].iter().map(|b| u32::from(*b)).collect();
            let stops = full.stops.clone();
            let (mut rest, none) = new(&AnswerSpec { generated, stops, ..spec() });
            assert_eq!(none, None);
            assert_eq!(run(&mut rest, &text[cut..]), (texts[cut..].to_vec(), end.clone()));
        }
    }

    #[test]
    fn an_answer_may_be_whole_already() {
        let generated = vec![97, 98];
        let whole = AnswerSpec { generated: generated.clone(), tokens_max: 2, ..spec() };
        assert_eq!(new(&whole).1, ending(FinishReason::Length, "", 2));
        let stopped = AnswerSpec { generated, stops: vec!["b".to_owned()], ..spec() };
        assert_eq!(new(&stopped).1, ending(FinishReason::Stop, "", 2));
        let nothing = AnswerSpec { tokens_max: 0, ..spec() };
        assert_eq!(new(&nothing).1, ending(FinishReason::Length, "", 0));
    }

    #[test]
    fn logprobs_come_when_asked_for() {
        let (mut answer, _) = new(&AnswerSpec { logprobs: true, ..spec() });
        let pushed = answer.push(&output(b'a'.into())).unwrap();
        let top = |id: u8, logprob| TopLogprob {
            id: id.into(),
            text: char::from(id).to_string(),
            logprob,
        };
        let logprobs = TokenLogprobs {
            logprob: -0.5,
            text: "a".to_owned(),
            top: vec![top(b'a', -0.5), top(b'x', -2.0)],
        };
        let event = GenerateEvent::Token { id: 97, text: "a".to_owned(), logprobs: Some(logprobs) };
        assert_eq!(pushed.event, Some(event));
    }
}
