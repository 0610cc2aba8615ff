//! Text of tokens as they come, one by one.

use super::{TextError, Tokenizer};

/// What decoders write for bytes that are no UTF-8, and for the first bytes of a character.
const REPLACEMENT: char = '\u{FFFD}';
/// Tokens that may wait for their text. Four bytes make any character, so more than a few waiting
/// means a stream of broken bytes; the limit keeps each step's cost constant then.
const PENDING_MAX: usize = 16;

/// Turns tokens into text incrementally: the parts put together are what decoding all tokens at
/// once gives, and no part ends inside a character.
///
/// How a token reads can depend on the ones before it (a leading space is dropped at the start of a
/// text, bytes join into characters), so the tokens of the last part are decoded again together
/// with the new ones and their text taken off. Each step decodes a bounded number of tokens.
#[derive(Debug, Default)]
pub struct Detokenizer {
    /// Tokens of the last part, then the pending ones.
    window: Vec<u32>,
    /// How many of `window` belong to the last part.
    context: usize,
    /// Text of the first `context` tokens of `window`.
    context_text: String,
}

impl Detokenizer {
    /// At the start of a text.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the end of what comes before the text, so that the first token's space is kept.
    pub fn after(tokenizer: &Tokenizer, before: &[u32]) -> Result<Self, TextError> {
        let mut detokenizer = Self::new();
        let tail = before.len().saturating_sub(PENDING_MAX);
        for &token in &before[tail..] {
            detokenizer.push(tokenizer, token)?;
        }
        Ok(detokenizer)
    }

    /// Takes one token; returns the text that became certain with it, often all of its own.
    /// Special tokens have none.
    pub fn push(&mut self, tokenizer: &Tokenizer, token: u32) -> Result<String, TextError> {
        if tokenizer.is_special(token) {
            return Ok(String::new());
        }
        self.window.push(token);
        let text = self.pending_text(tokenizer)?;
        // A replacement at the end may be a character that is not complete yet. A text that ends
        // with a true one waits in vain, which costs a delay only.
        if text.ends_with(REPLACEMENT) && self.window.len() - self.context <= PENDING_MAX {
            return Ok(String::new());
        }
        self.close_part(tokenizer, !text.is_empty())?;
        Ok(text)
    }

    /// The text still held back when no token follows: the replacement of an unfinished character.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String, TextError> {
        let text = self.pending_text(tokenizer)?;
        *self = Self::new();
        Ok(text)
    }

    /// Text of the tokens behind the context.
    fn pending_text(&self, tokenizer: &Tokenizer) -> Result<String, TextError> {
        let text = tokenizer.decode(&self.window)?;
        match text.strip_prefix(&self.context_text) {
            Some(pending) => Ok(pending.to_owned()),
            // The new bytes changed how the old ones read (one bad byte spoils a run of byte
            // tokens): what was handed out stays, the new tokens read by themselves.
            None => tokenizer.decode(&self.window[self.context..]),
        }
    }

    /// Makes the pending tokens the context of the next ones.
    fn close_part(&mut self, tokenizer: &Tokenizer, has_text: bool) -> Result<(), TextError> {
        if has_text {
            self.window.drain(..self.context);
        }
        // Without text the tokens join the old context: a lone `▁` at the start must not make
        // the next one look like a start too. A bound holds for endless silence.
        let excess = self.window.len().saturating_sub(PENDING_MAX);
        self.window.drain(..excess);
        self.context = self.window.len();
        self.context_text = tokenizer.decode(&self.window)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::tokenizer::samples, *};

    fn stream(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
        let mut detokenizer = Detokenizer::new();
        let mut parts: Vec<String> =
            (ids.iter()).map(|id| detokenizer.push(tokenizer, *id).unwrap()).collect();
        parts.push(detokenizer.finish(tokenizer).unwrap());
        parts
    }

    fn bytes(text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    #[test]
    fn a_character_comes_whole() {
        for tokenizer in [samples::byte_level(), samples::byte_fallback()] {
            let parts = stream(&tokenizer, &bytes("é鹭🦩"));
            assert_eq!(parts, ["", "é", "", "", "鹭", "", "", "", "🦩", ""]);
        }
    }

    #[test]
    fn an_unfinished_character_shows_at_the_end() {
        let tokenizer = samples::byte_level();
        assert_eq!(stream(&tokenizer, &[0x61, 0xC3]), ["a", "", "\u{FFFD}"]);
    }

    #[test]
    fn only_the_first_space_is_dropped() {
        let tokenizer = samples::byte_fallback();
        assert_eq!(stream(&tokenizer, &[258, 258, 259]), ["a", " a", "b", ""]);
        assert_eq!(stream(&tokenizer, &[256, 258, 258]), ["", " a", " a", ""]);
    }

    #[test]
    fn the_space_after_a_prompt_is_kept() {
        let tokenizer = samples::byte_fallback();
        let mut detokenizer = Detokenizer::after(&tokenizer, &[258, 259]).unwrap();
        assert_eq!(detokenizer.push(&tokenizer, 258).unwrap(), " a");
    }

    #[test]
    fn special_tokens_have_no_text_and_part_nothing() {
        let tokenizer = samples::byte_level();
        assert_eq!(stream(&tokenizer, &[258, 0xC3, 258, 0xA9]), ["", "", "", "é", ""]);
    }

    #[test]
    fn broken_bytes_pass_in_bounded_memory() {
        let after = [
            (samples::byte_level(), [0x62, 0x61]),
            // Byte tokens right behind bad ones read as bad too.
            (samples::byte_fallback(), [259, 257]),
        ];
        for (tokenizer, [b, a]) in after {
            let mut detokenizer = Detokenizer::new();
            for step in 0..1000_u32 {
                let byte = 0x80 + (step * 7) % 0x80;
                detokenizer.push(&tokenizer, byte).unwrap();
                assert!(detokenizer.window.len() <= 2 * PENDING_MAX + 2);
            }
            detokenizer.push(&tokenizer, b).unwrap();
            assert_eq!(detokenizer.push(&tokenizer, a).unwrap(), "a");
        }
    }

    proptest! {
        #[test]
        fn parts_join_to_the_whole(text in "\\PC{0,40}", cuts in prop::collection::vec(any::<bool>(), 40)) {
            // Any mixture of whole tokens and single bytes, with special tokens between.
            for tokenizer in [samples::byte_level(), samples::byte_fallback()] {
                let mut ids = Vec::new();
                for (c, cut) in text.chars().zip(&cuts) {
                    if *cut {
                        ids.extend(bytes(&c.to_string()));
                    } else {
                        ids.extend(tokenizer.encode(&c.to_string()).unwrap());
                    }
                    if c == 'a' {
                        ids.push(260);
                    }
                }
                prop_assert_eq!(stream(&tokenizer, &ids).concat(), tokenizer.decode(&ids).unwrap());
            }
        }

        #[test]
        fn any_bytes_join_to_the_whole(ids in prop::collection::vec(0_u32..260, 0..PENDING_MAX)) {
            let tokenizer = samples::byte_level();
            let parts = stream(&tokenizer, &ids);
            prop_assert_eq!(parts.concat(), tokenizer.decode(&ids).unwrap());
        }

        #[test]
        fn nothing_panics(ids in prop::collection::vec(prop_oneof![0_u32..300, 0x80_u32..0x100], 0..60)) {
            stream(&samples::byte_fallback(), &ids);
            stream(&samples::byte_level(), &ids);
        }
    }
}
