//! How steps run: what is fed goes through the layers, what is drawn comes back. The next decode step is begun before
//! it is asked for, on all ranks alike: they are told the same steps, and all know what was drawn.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use mlx_rs::Array;
use mlx_rs::error::Exception;
use mlx_rs::ops::{concatenate, minimum};
use mlx_rs::transforms::{async_eval, eval};

use super::{Engine, EngineError, Feed, Ranks, SeqId, ids};
use crate::batch::RowId;
use crate::distributed::{Group, GroupError};
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

/// What draws follow from, at the end of the layers.
#[derive(Clone, Copy)]
struct Ends<'a> {
    /// The last state of each row, `[1, rows, width]`.
    hidden: &'a Array,
    rows: &'a [Fed],
    /// `[rows]`: tokens that are fed, but not noted yet.
    pending: Option<&'a Array>,
}

/// Draws of several rows, still on the device.
struct Drawn {
    rows: Vec<RowId>,
    /// `[rows]`, uint32: what the next step feeds. Every rank has them.
    tokens: Array,
    /// On the first rank, with where each row's is.
    report: Option<(Array, Vec<Range<usize>>)>,
}

impl Drawn {
    /// Waits for the outcome, by row.
    fn read(&self) -> Result<Vec<(RowId, StepOutput)>, Exception> {
        let array = self.report.as_ref().map_or(&self.tokens, |(report, _)| report);
        timing::wait(|| array.eval())?;
        let numbers = array.as_slice::<u32>();
        let output = |(index, row): (usize, &RowId)| {
            let own = match &self.report {
                Some((_, spans)) => &numbers[spans[index].clone()],
                None => &numbers[index..=index],
            };
            (*row, StepOutput::parse(own))
        };
        Ok(self.rows.iter().enumerate().map(output).collect())
    }
}

/// A decode step that was begun before it was asked for.
pub(super) struct Ahead {
    /// The token that each row was fed, and its draw's number.
    fed: BTreeMap<RowId, (u32, u64)>,
    drawn: Drawn,
}

impl Ranks {
    /// Whether a step may be begun while the host does something else.
    fn look_ahead(&self) -> bool {
        match self {
            Self::Alone => true,
            Self::Pipeline(pipeline) => pipeline.group().runs_beside_the_host(),
            Self::Team(team) => team.group().is_none_or(Group::runs_beside_the_host),
        }
    }

    /// What it means that work of this rank's failed.
    fn failure(&self, error: Exception) -> EngineError {
        match self {
            Self::Alone => EngineError::Mlx(error),
            Self::Pipeline(_) => GroupError::collective("a message", &error).into(),
            Self::Team(_) => GroupError::collective("a sum", &error).into(),
        }
    }

    /// Hands work to the device.
    fn submit(&self, arrays: &[&Array]) -> Result<(), EngineError> {
        let arrays = arrays.iter().copied();
        timing::submit(|| async_eval(arrays)).map_err(|error| self.failure(error))
    }
}

impl Engine {
    /// Nothing is begun ahead here: MLX takes no more work than the device soon gets to, so that whoever waits for the
    /// first token would wait for most of the second one too.
    pub(super) fn run_prefill(&mut self, batch: &Batch) -> Result<Option<StepOutput>, EngineError> {
        let tokens = ids(&batch.tokens);
        let Some(drawn) = self.pass(&tokens, &batch.rows, batch.draws, None)? else {
            return Ok(None);
        };
        let outputs = self.read(&drawn)?;
        Ok(outputs.into_iter().next().map(|(_, output)| output))
    }

    /// One token to each of several sequences. While the caller handles what is drawn, the device already works on the
    /// next step.
    pub(super) fn run_decode(&mut self, feeds: &[Feed]) -> Result<Vec<StepOutput>, EngineError> {
        let (ready, cold) = self.settle(feeds)?;
        self.note(feeds);
        let mut drawn = Vec::from_iter(ready);
        if !cold.is_empty() {
            let Batch { rows, tokens, draws } = self.gather(&cold)?;
            drawn.extend(self.pass(&ids(&tokens), &rows, draws, None)?);
        }
        let rows: Vec<Fed> = feeds.iter().map(|feed| self.fed(feed)).collect();
        let begun = self.begin(&rows, &drawn)?;
        let mut outputs = Vec::with_capacity(rows.len());
        for drawn in &drawn {
            outputs.extend(self.read(drawn)?);
        }
        self.keep_ahead(begun, &outputs);
        let mut outputs: BTreeMap<RowId, StepOutput> = outputs.into_iter().collect();
        Ok(rows.iter().filter_map(|fed| outputs.remove(&fed.row)).collect())
    }

    fn read(&self, drawn: &Drawn) -> Result<Vec<(RowId, StepOutput)>, EngineError> {
        let outputs = drawn.read().map_err(|error| self.ranks.failure(error))?;
        let vocab_size = self.info.vocab_size;
        match outputs.iter().find(|(_, output)| output.token as usize >= vocab_size) {
            None => Ok(outputs),
            // A rank whose own peer is gone goes on with what happens to be in its memory.
            Some((_, StepOutput { token, .. })) => {
                let reason = format!("{token} came, which is no token of {vocab_size}");
                Err(self.ranks.failure(Exception::custom(reason)))
            }
        }
    }

    /// What came from another rank as tokens, which may be anything if that rank is gone: reading rows of the
    /// embedding is not checked.
    fn within_vocabulary(&self, tokens: &Array) -> Result<Array, Exception> {
        minimum(tokens, &self.last_token)
    }

    /// Takes back what was begun for rows that are fed something else now, or nothing. Returns what is confirmed, and
    /// the feeds that are yet to be run.
    fn settle(&mut self, feeds: &[Feed]) -> Result<(Option<Drawn>, Vec<Feed>), EngineError> {
        let wanted: BTreeMap<RowId, &Feed> =
            feeds.iter().map(|feed| (self.fed(feed).row, feed)).collect();
        let (ahead, mut confirmed) = (self.ahead.take(), BTreeSet::new());
        for (&row, &(token, draw)) in ahead.iter().flat_map(|ahead| &ahead.fed) {
            match wanted.get(&row) {
                Some(feed) if (feed.token, feed.draw) == (token, draw) => {
                    confirmed.insert(row);
                }
                Some(_) | None => self.take_back(row)?,
            }
        }
        let ready = ahead.filter(|_| !confirmed.is_empty()).map(|ahead| ahead.drawn);
        let cold = feeds.iter().filter(|feed| !confirmed.contains(&self.fed(feed).row));
        let cold = cold.copied().collect();
        Ok((ready, cold))
    }

    /// Takes back what was begun for one sequence.
    pub(super) fn take_back_ahead(&mut self, seq: SeqId) -> Result<(), EngineError> {
        match self.sequences.get(&seq).map(|sequence| sequence.row) {
            Some(row) if self.forget_ahead(row) => self.take_back(row),
            Some(_) | None => Ok(()),
        }
    }

    /// Forgets what was begun for a row; says whether there was anything.
    pub(super) fn forget_ahead(&mut self, row: RowId) -> bool {
        let begun = self.ahead.as_mut().is_some_and(|ahead| ahead.fed.remove(&row).is_some());
        self.ahead.take_if(|ahead| ahead.fed.is_empty());
        begun
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
        self.ahead = begun.map(|(rows, drawn)| {
            let tokens: BTreeMap<RowId, u32> =
                outputs.iter().map(|(row, output)| (*row, output.token)).collect();
            let fed =
                rows.iter().filter_map(|fed| Some((fed.row, (*tokens.get(&fed.row)?, fed.draw))));
            Ahead { fed: fed.collect(), drawn }
        });
    }

    /// Begins to feed what `drawn` has for `rows`, unless a context is full with it, none of the rows goes on, or
    /// nothing may be begun ahead.
    fn begin(
        &mut self,
        rows: &[Fed],
        drawn: &[Drawn],
    ) -> Result<Option<(Vec<Fed>, Drawn)>, EngineError> {
        let max_context = self.info.max_context;
        let is_full = |fed: &Fed| self.sequences[&fed.seq].position >= max_context;
        let ends = |fed: &Fed| fed.draw >= self.sequences[&fed.seq].last_draw;
        if !self.ranks.look_ahead() || rows.iter().any(is_full) || rows.iter().all(ends) {
            return Ok(None);
        }
        let order = self.segments.gather(&rows.iter().map(|fed| fed.row).collect())?;
        let next: BTreeMap<RowId, Fed> =
            rows.iter().map(|fed| (fed.row, Fed { draw: fed.draw + 1, ..*fed })).collect();
        let rows: Vec<Fed> = order.iter().map(|row| next[row]).collect();
        let tokens = in_order(&order, drawn)?;
        let drawn =
            self.pass(&tokens.reshape(&[1, rows.len() as i32])?, &rows, true, Some(&tokens))?;
        Ok(drawn.map(|drawn| (rows, drawn)))
    }

    /// Feeds `tokens` `[1, positions]` to `rows`, each the same number. With `draws` it is only begun; else it is
    /// waited for, and nothing comes of it. `pending` as in [`Ends`].
    ///
    /// Messages and sums run in the order in which they are handed to the device: each rank must hand over those of
    /// one pass before those of the next, and in the order of the other ranks.
    fn pass(
        &mut self,
        tokens: &Array,
        rows: &[Fed],
        draws: bool,
        pending: Option<&Array>,
    ) -> Result<Option<Drawn>, EngineError> {
        let ranks = self.ranks.clone();
        let (count, positions) = (rows.len() as i32, tokens.dim(1));
        let (hidden, wanted) = match &ranks {
            Ranks::Pipeline(pipeline) => {
                let wanted = if pipeline.is_last() { count } else { positions };
                match pipeline.is_first() {
                    true => (self.model.embed(tokens)?, wanted),
                    false => (pipeline.receive_hidden(positions)?, wanted),
                }
            }
            Ranks::Alone | Ranks::Team(_) => (self.model.embed(tokens)?, count),
        };
        let fed = rows.iter().map(|fed| fed.row).collect();
        let mut pass = self.segments.pass(&fed, positions / count)?;
        // Long prompts are waited for in parts, and with them what came from other ranks.
        let hidden = self.model.forward(hidden, wanted, &mut pass).map_err(|e| ranks.failure(e))?;
        if !draws {
            let mut arrays: Vec<Array> = pass.arrays().into_iter().cloned().collect();
            // A single position may have been put into the buffers by what made its hidden state.
            arrays.extend((positions == count).then(|| hidden.clone()));
            if let Ranks::Pipeline(pipeline) = &ranks
                && !pipeline.is_last()
            {
                arrays.push(pipeline.send_hidden(&hidden)?);
            }
            let arrays: Vec<&Array> = arrays.iter().collect();
            ranks.submit(&arrays)?;
            timing::wait(|| eval(arrays.iter().copied())).map_err(|e| ranks.failure(e))?;
            return Ok(None);
        }
        let ends = Ends { hidden: &hidden, rows, pending };
        let drawn = match &ranks {
            Ranks::Alone => self.draw_alone(ends),
            Ranks::Pipeline(pipeline) => self.draw_in_pipeline(pipeline, ends),
            Ranks::Team(team) => self.draw_in_team(team, ends),
        };
        drawn.map(Some)
    }

    fn draw_alone(&mut self, ends: Ends<'_>) -> Result<Drawn, EngineError> {
        let (Draw { tokens, report }, rows) = (self.draw(ends)?, ends.rows);
        self.ranks.submit(&[&tokens, &report])?;
        let report = Some((report, self.spans(rows)));
        Ok(Drawn { rows: row_ids(rows), tokens, report })
    }

    /// The last rank draws and tells the first, which tells those between, each by the one before it.
    fn draw_in_pipeline(
        &mut self,
        pipeline: &Pipeline,
        ends: Ends<'_>,
    ) -> Result<Drawn, EngineError> {
        let Ends { hidden, rows, .. } = ends;
        let (ids, count) = (row_ids(rows), rows.len());
        if pipeline.is_last() {
            let Draw { tokens, report } = self.draw(ends)?;
            self.ranks.submit(&[&tokens, &pipeline.send_report(&report)?])?;
            return Ok(Drawn { rows: ids, tokens, report: None });
        }
        self.ranks.submit(&[&pipeline.send_hidden(hidden)?])?;
        if !pipeline.is_first() {
            let tokens = pipeline.receive_tokens(count)?;
            let passed_on = pipeline.pass_on_tokens(&tokens)?;
            self.ranks.submit(&[passed_on.as_ref().unwrap_or(&tokens)])?;
            return Ok(Drawn { rows: ids, tokens, report: None });
        }
        let spans = self.spans(rows);
        let report = pipeline.receive_report(spans.last().map_or(0, |span| span.end))?;
        let tokens = match report.dim(0) as usize == count {
            true => report.clone(),
            false => {
                let starts: Vec<u32> = spans.iter().map(|span| span.start as u32).collect();
                report.take_axis(Array::from_slice(&starts, &[count as i32]), 0)?
            }
        };
        let passed_on = pipeline.pass_on_tokens(&tokens)?;
        self.ranks.submit(&[&report, passed_on.as_ref().unwrap_or(&tokens)])?;
        let tokens = self.within_vocabulary(&tokens)?;
        Ok(Drawn { rows: ids, tokens, report: Some((report, spans)) })
    }

    /// All ranks have done the same work on their parts of each layer; the first alone has the head and draws, so that
    /// all go on with the same tokens even where their sums differ by rounding.
    fn draw_in_team(&mut self, team: &Team, ends: Ends<'_>) -> Result<Drawn, EngineError> {
        let Ends { hidden, rows, .. } = ends;
        if team.is_first() {
            let Draw { tokens, report } = self.draw(ends)?;
            let tokens = self.within_vocabulary(&team.share_tokens(&tokens)?)?;
            self.ranks.submit(&[&tokens, &report])?;
            let report = Some((report, self.spans(rows)));
            return Ok(Drawn { rows: row_ids(rows), tokens, report });
        }
        // Before the tokens, which nothing else here would keep behind the layers' sums.
        self.ranks.submit(&[hidden])?;
        let nothing = Array::from_slice(&vec![0_u32; rows.len()], &[rows.len() as i32]);
        let tokens = self.within_vocabulary(&team.share_tokens(&nothing)?)?;
        self.ranks.submit(&[&tokens])?;
        Ok(Drawn { rows: row_ids(rows), tokens, report: None })
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

    fn draw(&mut self, ends: Ends<'_>) -> Result<Draw, EngineError> {
        let Ends { hidden, rows, pending } = ends;
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
        Ok(sample::draw(&logits, &rows_to_draw)?)
    }
}

fn row_ids(rows: &[Fed]) -> Vec<RowId> {
    rows.iter().map(|fed| fed.row).collect()
}

/// The tokens of `rows`, `[rows]`, wherever they were drawn.
fn in_order(rows: &[RowId], drawn: &[Drawn]) -> Result<Array, Exception> {
    if let [one] = drawn
        && one.rows == rows
    {
        return Ok(one.tokens.clone());
    }
    let all: Vec<RowId> = drawn.iter().flat_map(|drawn| drawn.rows.iter().copied()).collect();
    // A row that was taken back may stand twice: its newest draw is the last.
    let place = |row: &RowId| all.iter().rposition(|other| other == row).map(|at| at as u32);
    let places: Vec<u32> = rows.iter().filter_map(place).collect();
    assert_eq!(places.len(), rows.len(), "every row was drawn for");
    let tokens: Vec<Array> = drawn.iter().map(|drawn| drawn.tokens.clone()).collect();
    concatenate(&tokens, 0)?.take_axis(Array::from_slice(&places, &[rows.len() as i32]), 0)
}
