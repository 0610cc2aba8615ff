//! How steps run, for one rank and for several: what is fed goes through the layers, what is drawn comes back. On a
//! rank of its own the next decode step is begun before it is asked for.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use mlx_rs::Array;
use mlx_rs::error::Exception;
use mlx_rs::ops::concatenate;
use mlx_rs::transforms::{async_eval, eval};

use super::{Engine, EngineError, Feed, SeqId, ids, wait};
use crate::batch::RowId;
use crate::pipeline::Pipeline;
use crate::sample::{self, Draw, Row, StepOutput};
use crate::tensor::Team;
use crate::timing;

/// One sequence in a pass.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fed {
    pub(super) row: RowId,
    pub(super) seq: SeqId,
    pub(super) draw: u64,
}

/// What one pass feeds: a token to each of several sequences, or several to one.
pub(super) struct Batch {
    /// In the order of the caches.
    pub(super) rows: Vec<Fed>,
    pub(super) tokens: Vec<u32>,
    /// Whether it ends in draws.
    pub(super) draws: bool,
}

impl Batch {
    fn row_ids(&self) -> BTreeSet<RowId> {
        self.rows.iter().map(|fed| fed.row).collect()
    }

    fn positions(&self) -> i32 {
        (self.tokens.len() / self.rows.len()) as i32
    }
}

/// Draws of several rows, still on the device.
struct Drawn {
    rows: Vec<RowId>,
    /// Where each row's report is.
    spans: Vec<Range<usize>>,
    draw: Draw,
}

impl Drawn {
    fn begin(rows: Vec<RowId>, spans: Vec<Range<usize>>, draw: Draw) -> Result<Self, Exception> {
        timing::submit(|| async_eval([&draw.tokens, &draw.report]))?;
        Ok(Self { rows, spans, draw })
    }

    /// Waits for the outcome, by row.
    fn read(&self) -> Result<Vec<(RowId, StepOutput)>, Exception> {
        let outputs = parse(&self.draw.report, &self.spans)?;
        Ok(self.rows.iter().copied().zip(outputs).collect())
    }
}

fn parse(report: &Array, spans: &[Range<usize>]) -> Result<Vec<StepOutput>, Exception> {
    timing::wait(|| report.eval())?;
    let report = report.as_slice::<u32>();
    Ok(spans.iter().map(|span| StepOutput::parse(&report[span.clone()])).collect())
}

/// A decode step that was begun before it was asked for.
pub(super) struct Ahead {
    /// The token that each row was fed, and its draw's number.
    fed: BTreeMap<RowId, (u32, u64)>,
    drawn: Drawn,
}

impl Ahead {
    /// Forgets a row that is closed; false when none is left.
    pub(super) fn forget(&mut self, row: RowId) -> bool {
        self.fed.remove(&row);
        !self.fed.is_empty()
    }
}

impl Engine {
    /// While the caller handles a token, the device already works on the next one.
    pub(super) fn prefill_alone(
        &mut self,
        batch: &Batch,
    ) -> Result<Option<StepOutput>, EngineError> {
        let Some(drawn) = self.run_alone(batch)? else { return Ok(None) };
        let begun = self.begin(&batch.rows, std::slice::from_ref(&drawn))?;
        let outputs = drawn.read()?;
        self.keep_ahead(begun, &outputs);
        Ok(outputs.into_iter().next().map(|(_, output)| output))
    }

    /// As [`Engine::prefill_alone`] for one token to each of several sequences.
    pub(super) fn decode_alone(&mut self, feeds: &[Feed]) -> Result<Vec<StepOutput>, EngineError> {
        let (mut drawn, cold) = self.settle(feeds)?;
        self.note(feeds);
        if !cold.is_empty() {
            let batch = self.gather(&cold)?;
            drawn.extend(self.run_alone(&batch)?);
        }
        let rows: Vec<Fed> = feeds.iter().map(|feed| self.fed(feed)).collect();
        let begun = self.begin(&rows, &drawn)?;
        let mut outputs = Vec::with_capacity(rows.len());
        for drawn in &drawn {
            outputs.extend(drawn.read()?);
        }
        self.keep_ahead(begun, &outputs);
        let mut outputs: BTreeMap<RowId, StepOutput> = outputs.into_iter().collect();
        Ok(rows.iter().filter_map(|fed| outputs.remove(&fed.row)).collect())
    }

    /// Takes back what was begun for rows that are fed something else now, or nothing. Returns what is confirmed, and
    /// the feeds that are yet to be run.
    fn settle(&mut self, feeds: &[Feed]) -> Result<(Vec<Drawn>, Vec<Feed>), EngineError> {
        let wanted: BTreeMap<RowId, &Feed> =
            feeds.iter().map(|feed| (self.fed(feed).row, feed)).collect();
        let (mut ready, mut confirmed) = (Vec::new(), BTreeSet::new());
        for ahead in std::mem::take(&mut self.ahead) {
            let before = confirmed.len();
            for (&row, &(token, draw)) in &ahead.fed {
                match wanted.get(&row) {
                    Some(feed) if (feed.token, feed.draw) == (token, draw) => {
                        confirmed.insert(row);
                    }
                    Some(_) | None => self.take_back(row)?,
                }
            }
            if confirmed.len() > before {
                ready.push(ahead.drawn);
            }
        }
        let cold = feeds.iter().filter(|feed| !confirmed.contains(&self.fed(feed).row));
        let cold = cold.copied().collect();
        Ok((ready, cold))
    }

    /// Takes back what was begun for one sequence.
    pub(super) fn take_back_ahead(&mut self, seq: SeqId) -> Result<(), EngineError> {
        let Some(row) = self.sequences.get(&seq).map(|sequence| sequence.row) else {
            return Ok(());
        };
        let begun = self.ahead.iter_mut().any(|ahead| ahead.fed.remove(&row).is_some());
        self.ahead.retain(|ahead| !ahead.fed.is_empty());
        if begun { self.take_back(row) } else { Ok(()) }
    }

    /// Takes one token out of a row's cache again, if the row is still open.
    fn take_back(&mut self, row: RowId) -> Result<(), EngineError> {
        if let Some(sequence) = self.sequences.values_mut().find(|s| s.row == row) {
            sequence.history.iter_mut().for_each(crate::history::History::roll_back);
            self.segments.truncate(row, 1)?;
        }
        Ok(())
    }

    fn keep_ahead(&mut self, begun: Option<(Vec<Fed>, Drawn)>, outputs: &[(RowId, StepOutput)]) {
        if let Some((rows, drawn)) = begun {
            let tokens: BTreeMap<RowId, u32> =
                outputs.iter().map(|(row, output)| (*row, output.token)).collect();
            let fed =
                rows.iter().filter_map(|fed| Some((fed.row, (*tokens.get(&fed.row)?, fed.draw))));
            self.ahead.push(Ahead { fed: fed.collect(), drawn });
        }
    }

    /// Begins to feed what `drawn` has for `rows`, unless a context is full with it.
    fn begin(
        &mut self,
        rows: &[Fed],
        drawn: &[Drawn],
    ) -> Result<Option<(Vec<Fed>, Drawn)>, EngineError> {
        let max_context = self.info.max_context;
        let is_full = |fed: &Fed| self.sequences[&fed.seq].position >= max_context;
        if rows.iter().any(is_full) {
            return Ok(None);
        }
        let wanted: BTreeSet<RowId> = rows.iter().map(|fed| fed.row).collect();
        let order = self.segments.gather(&wanted)?;
        let next: BTreeMap<RowId, Fed> =
            rows.iter().map(|fed| (fed.row, Fed { draw: fed.draw + 1, ..*fed })).collect();
        let rows: Vec<Fed> = order.iter().map(|row| next[row]).collect();
        let tokens = in_order(&order, drawn)?;
        let hidden = self.model.embed(&tokens.reshape(&[1, rows.len() as i32])?)?;
        let mut pass = self.segments.pass(&wanted, 1)?;
        let hidden = self.model.forward(hidden, rows.len() as i32, &mut pass)?;
        let (spans, draw) = self.draw(&hidden, &rows, Some(&tokens))?;
        Ok(Some((rows, Drawn::begin(order, spans, draw)?)))
    }

    fn run_alone(&mut self, batch: &Batch) -> Result<Option<Drawn>, EngineError> {
        let hidden = self.model.embed(&ids(&batch.tokens))?;
        let mut pass = self.segments.pass(&batch.row_ids(), batch.positions())?;
        let hidden = self.model.forward(hidden, batch.rows.len() as i32, &mut pass)?;
        if !batch.draws {
            eval(pass.arrays())?;
            return Ok(None);
        }
        let (spans, draw) = self.draw(&hidden, &batch.rows, None)?;
        let rows = batch.rows.iter().map(|fed| fed.row).collect();
        Ok(Some(Drawn::begin(rows, spans, draw)?))
    }

    /// The outputs are in the order of the batch; there are none but on the first rank.
    pub(super) fn run_in_pipeline(
        &mut self,
        pipeline: &Pipeline,
        batch: &Batch,
    ) -> Result<Vec<StepOutput>, EngineError> {
        let (rows, fed) = (batch.rows.len() as i32, batch.tokens.len() as i32);
        let hidden = if pipeline.is_first() {
            self.model.embed(&ids(&batch.tokens))?
        } else {
            pipeline.receive_hidden(fed)?
        };
        let wanted = if pipeline.is_last() { rows } else { fed };
        let mut pass = self.segments.pass(&batch.row_ids(), batch.positions())?;
        let hidden = self.model.forward(hidden, wanted, &mut pass)?;
        if !batch.draws {
            // Nothing else may depend on the last layer's keys and values.
            let mut arrays: Vec<Array> = pass.arrays().into_iter().cloned().collect();
            if !pipeline.is_last() {
                arrays.push(pipeline.send_hidden(&hidden)?);
            }
            wait(&arrays.iter().collect::<Vec<_>>(), "recv")?;
            return Ok(Vec::new());
        }
        if pipeline.is_last() {
            let (_, draw) = self.draw(&hidden, &batch.rows, None)?;
            wait(&[&pipeline.send_report(&draw.report)?], "send")?;
        } else {
            wait(&[&pipeline.send_hidden(&hidden)?], "send")?;
        }
        if !pipeline.is_first() {
            return Ok(Vec::new());
        }
        let spans = self.spans(&batch.rows);
        let report = pipeline.receive_report(spans.last().map_or(0, |span| span.end))?;
        wait(&[&report], "recv")?;
        Ok(parse(&report, &spans)?)
    }

    /// All ranks do the same work on their parts of each layer; the first alone has the head and draws. Nothing is
    /// begun ahead: ranks whose steps went apart would wait for each other's sums for ever.
    pub(super) fn run_in_team(
        &mut self,
        team: &Team,
        batch: &Batch,
    ) -> Result<Vec<StepOutput>, EngineError> {
        let hidden = self.model.embed(&ids(&batch.tokens))?;
        let mut pass = self.segments.pass(&batch.row_ids(), batch.positions())?;
        let hidden = self.model.forward(hidden, batch.rows.len() as i32, &mut pass)?;
        // All ranks must evaluate the same sums: those behind the last layer's keys, or those behind its result.
        if !batch.draws {
            wait(&pass.arrays(), "all_sum")?;
            return Ok(Vec::new());
        }
        if !team.is_first() {
            wait(&[&hidden], "all_sum")?;
            return Ok(Vec::new());
        }
        let (spans, draw) = self.draw(&hidden, &batch.rows, None)?;
        wait(&[&draw.report], "all_sum")?;
        Ok(parse(&draw.report, &spans)?)
    }

    /// The rows of `feeds` in common buffers, as one pass feeds them.
    pub(super) fn gather(&mut self, feeds: &[Feed]) -> Result<Batch, EngineError> {
        let by_row: BTreeMap<RowId, &Feed> =
            feeds.iter().map(|feed| (self.fed(feed).row, feed)).collect();
        let order = self.segments.gather(&by_row.keys().copied().collect())?;
        let (rows, tokens) =
            order.iter().map(|row| (self.fed(by_row[row]), by_row[row].token)).unzip();
        Ok(Batch { rows, tokens, draws: true })
    }

    pub(super) fn fed(&self, feed: &Feed) -> Fed {
        Fed { row: self.sequences[&feed.seq].row, seq: feed.seq, draw: feed.draw }
    }

    /// Counts what is fed as part of the sequences.
    pub(super) fn note(&mut self, feeds: &[Feed]) {
        for feed in feeds {
            if let Some(sequence) = self.sequences.get_mut(&feed.seq) {
                sequence.position += 1;
                sequence.history.iter_mut().for_each(|history| history.feed(&[feed.token]));
            }
        }
    }

    fn spans(&self, rows: &[Fed]) -> Vec<Range<usize>> {
        let samplings = rows.iter().map(|fed| &self.sequences[&fed.seq].sampling);
        sample::spans(samplings, self.info.vocab_size)
    }

    /// Draws from the last hidden state of each row, `[1, rows, width]`. `pending` `[rows]` are tokens that are fed,
    /// but not noted yet. Also says where each row's report is.
    fn draw(
        &mut self,
        hidden: &Array,
        rows: &[Fed],
        pending: Option<&Array>,
    ) -> Result<(Vec<Range<usize>>, Draw), EngineError> {
        let logits = self.model.head(hidden)?.reshape(&[rows.len() as i32, -1])?;
        let mut counts = Vec::with_capacity(rows.len());
        for (index, fed) in rows.iter().enumerate() {
            let sequence = self.sequences.get_mut(&fed.seq);
            let history = sequence.and_then(|sequence| sequence.history.as_mut());
            counts.push(match (history, pending) {
                (None, _) => None,
                (Some(history), None) => Some(history.counts(logits.dim(1), None)?),
                (Some(history), Some(tokens)) => {
                    let index = Array::from_slice(&[index as u32], &[1, 1]);
                    let token = tokens.take_axis(&index, 0)?;
                    Some(history.counts(logits.dim(1), Some(&token))?)
                }
            });
        }
        let rows_to_draw: Vec<Row<'_>> = (rows.iter().zip(counts))
            .map(|(fed, counts)| {
                let sequence = &self.sequences[&fed.seq];
                let (sampling, bias) = (&sequence.sampling, sequence.bias.as_ref());
                Row { sampling, draw: fed.draw, counts, bias }
            })
            .collect();
        let draw = sample::draw(&logits, &rows_to_draw)?;
        Ok((self.spans(rows), draw))
    }
}

/// The tokens of `rows`, `[rows]`, wherever they were drawn.
fn in_order(rows: &[RowId], drawn: &[Drawn]) -> Result<Array, Exception> {
    if let [one] = drawn
        && one.rows == rows
    {
        return Ok(one.draw.tokens.clone());
    }
    let all: Vec<RowId> = drawn.iter().flat_map(|drawn| drawn.rows.iter().copied()).collect();
    // A row that was taken back may stand twice: its newest draw is the last.
    let place = |row: &RowId| all.iter().rposition(|other| other == row).map(|at| at as u32);
    let places: Vec<u32> = rows.iter().filter_map(place).collect();
    assert_eq!(places.len(), rows.len(), "every row was drawn for");
    let tokens: Vec<Array> = drawn.iter().map(|drawn| drawn.draw.tokens.clone()).collect();
    concatenate(&tokens, 0)?.take_axis(Array::from_slice(&places, &[rows.len() as i32]), 0)
}
