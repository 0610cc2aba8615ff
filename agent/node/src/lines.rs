//! Lines of what a child process writes, whatever it writes.
//!
//! A reader that stopped at a line that it doesn't like would leave the child stuck in front of a
//! full pipe. So bytes that are no UTF-8 are replaced, what is too long of a line is left out, and
//! only the end of the stream or a broken one ends the reading.

use tokio::io::{AsyncBufReadExt as _, AsyncRead, BufReader};

/// One line, without its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) text: String,
    /// The line was longer than the limit: this is its beginning.
    pub(crate) cut: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Lines<R> {
    reader: BufReader<R>,
    /// Longest line that is kept whole, in bytes.
    limit: usize,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    pub(crate) fn new(reader: R, limit: usize) -> Self {
        Self { reader: BufReader::new(reader), limit }
    }

    /// The next line; `None` at the end. Not cancel-safe: what has been read of a line is lost.
    pub(crate) async fn next(&mut self) -> Option<Line> {
        let (mut kept, mut cut) = (Vec::new(), false);
        // A pipe that can't be read any more has ended.
        while let Ok(bytes) = self.reader.fill_buf().await {
            if bytes.is_empty() {
                break;
            }
            let end = bytes.iter().position(|byte| *byte == b'\n');
            let part = &bytes[..end.unwrap_or(bytes.len())];
            let room = self.limit - kept.len();
            cut |= part.len() > room;
            kept.extend_from_slice(&part[..part.len().min(room)]);
            let consumed = part.len() + usize::from(end.is_some());
            self.reader.consume(consumed);
            if end.is_some() {
                return Some(line(&kept, cut));
            }
        }
        (!kept.is_empty()).then(|| line(&kept, cut))
    }
}

fn line(bytes: &[u8], cut: bool) -> Line {
    let bytes = bytes.strip_suffix(b"\r").unwrap_or(bytes);
    Line { text: String::from_utf8_lossy(bytes).into_owned(), cut }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn check(input: &[u8], expect: &[(&str, bool)]) {
        let mut lines = Lines::new(input, 8);
        for (text, cut) in expect {
            let line = Line { text: (*text).to_owned(), cut: *cut };
            assert_eq!(lines.next().await, Some(line), "{input:?}");
        }
        assert_eq!(lines.next().await, None, "{input:?}");
    }

    #[tokio::test]
    async fn odd_lines_do_not_end_the_reading() {
        check(b"", &[]).await;
        check(b"a\n\nb\r\nc", &[("a", false), ("", false), ("b", false), ("c", false)]).await;
        check(
            b"12345678\n123456789\nx\n",
            &[("12345678", false), ("12345678", true), ("x", false)],
        )
        .await;
        check(b"\xff\nx", &[("\u{fffd}", false), ("x", false)]).await;
        // A character cut in two is told as such.
        check("1234567é\nx".as_bytes(), &[("1234567\u{fffd}", true), ("x", false)]).await;
        // More than the buffer of the reader holds, without an end.
        let long = vec![b'a'; 100_000];
        check(&long, &[("aaaaaaaa", true)]).await;
    }
}
