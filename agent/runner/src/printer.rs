//! Standard output, written by a thread of its own: a reader that pauses (`| less`) holds up nobody, least of all other
//! ranks. Owns what waits to be written, which is one answer at most.

use std::{
    io::{self, Write},
    sync::mpsc::{self, Receiver, Sender},
    thread::{self, JoinHandle},
};

/// Ends with [`Printer::finish`].
pub(crate) struct Printer {
    texts: Sender<String>,
    thread: JoinHandle<io::Result<()>>,
}

impl Printer {
    pub(crate) fn start() -> io::Result<Self> {
        let (texts, receiver) = mpsc::channel();
        let thread = thread::Builder::new().name("printer".to_owned());
        Ok(Self { texts, thread: thread.spawn(move || write_all(&receiver, &mut io::stdout()))? })
    }

    /// Never waits. What comes of it is known in the end.
    pub(crate) fn print(&self, text: &str) {
        // Nobody takes texts any more when one could not be written.
        let _ = self.texts.send(text.to_owned());
    }

    /// Waits until everything is written, for as long as the reader likes.
    ///
    /// # Errors
    /// Something could not be written. A reader that has seen enough is no failure.
    pub(crate) fn finish(self) -> io::Result<()> {
        drop(self.texts);
        let written = self.thread.join().unwrap_or_else(|_| Err(io::Error::other("it panicked")));
        written.or_else(ignore_broken_pipe)
    }
}

fn write_all(texts: &Receiver<String>, out: &mut impl Write) -> io::Result<()> {
    for text in texts {
        out.write_all(text.as_bytes())?;
        out.flush()?;
    }
    Ok(())
}

/// A reader that has seen enough is no failure.
pub(crate) fn ignore_broken_pipe(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::BrokenPipe { Ok(()) } else { Err(error) }
}
