//! Stop texts across token borders.

/// Finds stop texts in a stream and holds back only what may still become one.
///
/// The stop that is complete first wins; of those complete at the same place, the longest. So the
/// outcome depends on the text alone, never on how it was cut into parts.
#[derive(Clone, Debug, Default)]
pub struct StopMatcher {
    stops: Vec<String>,
    /// End of the stream that is the beginning of some stop.
    held: String,
}

/// What [`StopMatcher::push`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// Text that is certainly not part of a stop.
    No(String),
    /// The text before a stop; the stop and all after it is dropped.
    Yes(String),
}

impl StopMatcher {
    /// Empty stop texts say nothing and are ignored.
    pub fn new(stops: impl IntoIterator<Item = String>) -> Self {
        Self {
            stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(),
            held: String::new(),
        }
    }

    /// Takes the next part of the stream.
    pub fn push(&mut self, text: &str) -> Stopped {
        if self.stops.is_empty() {
            return Stopped::No(text.to_owned());
        }
        self.held.push_str(text);
        let first = (self.stops.iter())
            .filter_map(|stop| self.held.find(stop).map(|start| (start + stop.len(), start)))
            .min();
        if let Some((_, start)) = first {
            let mut before = std::mem::take(&mut self.held);
            before.truncate(start);
            return Stopped::Yes(before);
        }
        let keep =
            (self.stops.iter()).map(|stop| longest_beginning(&self.held, stop)).max().unwrap_or(0);
        let held = self.held.split_off(self.held.len() - keep);
        Stopped::No(std::mem::replace(&mut self.held, held))
    }

    /// The text still held back when the stream ends without a stop.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes of the longest end of `text` that is a beginning of `stop`, but not all of it.
fn longest_beginning(text: &str, stop: &str) -> usize {
    (stop.char_indices().map(|(at, _)| at).rev())
        .find(|&at| text.ends_with(&stop[..at]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[&str], parts: &[&str]) -> (Vec<String>, bool) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| (*s).to_owned()));
        let mut out = Vec::new();
        for part in parts {
            match matcher.push(part) {
                Stopped::No(text) => out.push(text),
                Stopped::Yes(text) => {
                    out.push(text);
                    return (out, true);
                }
            }
        }
        out.push(matcher.finish());
        (out, false)
    }

    fn check(stops: &[&str], parts: &[&str], expect: &[&str], stopped: bool) {
        let (out, found) = run(stops, parts);
        assert_eq!((out.as_slice(), found), (to_owned(expect).as_slice(), stopped));
    }

    fn to_owned(parts: &[&str]) -> Vec<String> {
        parts.iter().map(|s| (*s).to_owned()).collect()
    }

    #[test]
    fn stops() {
        check(&[], &["a", "b"], &["a", "b", ""], false);
        check(&["END"], &["one E", "ND two"], &["one ", ""], true);
        check(&["END"], &["one E", "N", "x"], &["one ", "", "ENx", ""], false);
        check(&["END"], &["one EN"], &["one ", "EN"], false);
        check(&["\n\n"], &["a\n", "\nb"], &["a", ""], true);
        // The one complete first, then the longest.
        check(&["xaby", "ab"], &["xa", "by"], &["", "x"], true);
        check(&["b", "ab"], &["xab"], &["x"], true);
        // A shorter beginning stays when a longer one fails.
        check(&["aab"], &["aa", "a", "b"], &["", "a", ""], true);
        check(&["é鹭"], &["xé", "é", "鹭"], &["x", "é", ""], true);
    }

    /// Looks at each beginning of the text in turn.
    fn oracle(stops: &[String], text: &str) -> (String, bool) {
        let ends = text.char_indices().map(|(at, c)| at + c.len_utf8());
        for end in ends {
            let here = stops.iter().filter(|stop| text[..end].ends_with(*stop));
            if let Some(longest) = here.map(String::len).max() {
                return (text[..end - longest].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    proptest! {
        #[test]
        fn as_the_oracle(
            stops in prop::collection::vec("[ab鹭]{1,4}", 0..4),
            parts in prop::collection::vec("[abc鹭]{0,5}", 0..12),
        ) {
            let refs: Vec<&str> = stops.iter().map(String::as_str).collect();
            let pieces: Vec<&str> = parts.iter().map(String::as_str).collect();
            let (out, found) = run(&refs, &pieces);
            prop_assert_eq!((out.concat(), found), oracle(&stops, &parts.concat()));
        }

        #[test]
        fn holds_back_no_more_than_needed(
            stops in prop::collection::vec("[ab]{1,4}", 1..4),
            parts in prop::collection::vec("[abc]{0,5}", 1..8),
        ) {
            let mut matcher = StopMatcher::new(stops.clone());
            for part in &parts {
                if let Stopped::Yes(_) = matcher.push(part) {
                    return Ok(());
                }
                let held = &matcher.held;
                prop_assert!(held.is_empty() || stops.iter().any(|s| s.starts_with(held.as_str())));
            }
        }
    }
}
