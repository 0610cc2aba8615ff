//! What the ranks of a pipeline pass on: hidden states from each rank to the next, the drawn token from the last to
//! the first and from there to those between. Owns who sends to whom; never computes layers.

use std::ops::Range;

use mlx_rs::{Array, Dtype};

use crate::distributed::{Group, GroupError};
use crate::engine::EngineError;
use crate::models::Part;

/// Types that hidden states can have; a rank announces its place in this list.
const WIRE_TYPES: [Dtype; 3] = [Dtype::Float32, Dtype::Float16, Dtype::Bfloat16];

#[derive(Clone)]
pub(crate) struct Pipeline {
    group: Group,
    hidden_size: i32,
    /// The type of hidden states between ranks: that of the first rank's embedding.
    dtype: Dtype,
}

/// The part of `layers` that `group`'s own rank holds.
pub(crate) fn part(group: Option<&Group>, layers: Range<usize>) -> Part {
    let (rank, size) = group.map_or((0, 1), |g| (g.rank(), g.size()));
    Part { layers, first: rank == 0, last: rank + 1 == size }
}

impl Pipeline {
    /// Meets the other ranks: checks that all parts together are the model, and agrees on the type of hidden states,
    /// which the first rank gives.
    ///
    /// Blocks until all ranks have come here.
    pub(crate) fn meet(
        group: Group,
        part: &Part,
        layers: usize,
        hidden_size: usize,
        embedding: Option<Dtype>,
    ) -> Result<Self, EngineError> {
        let code = embedding.and_then(|d| WIRE_TYPES.iter().position(|t| *t == d));
        let own = [
            part.layers.start as i32,
            part.layers.end as i32,
            code.map_or(-1, |c| c as i32),
            hidden_size as i32,
        ];
        let all = group.all_gather(&Array::from_slice(&own, &[1, 4]))?;
        let all: Vec<i32> = read(&all, "all_gather")?;
        let ranks: Vec<&[i32]> = all.chunks_exact(4).collect();
        let mut next = 0;
        for (rank, fields) in ranks.iter().enumerate() {
            if fields[0] != next || fields[1] <= fields[0] || fields[3] != own[3] {
                return Err(EngineError::Layers(format!(
                    "rank {rank} of {} holds layers {}..{} of hidden size {}, expected layers from {next} on \
                     and hidden size {}",
                    ranks.len(),
                    fields[0],
                    fields[1],
                    fields[3],
                    own[3]
                )));
            }
            next = fields[1];
        }
        if next as usize != layers {
            return Err(EngineError::Layers(format!(
                "the ranks hold layers up to {next}, the model has {layers}"
            )));
        }
        let dtype = ranks.first().and_then(|f| WIRE_TYPES.get(usize::try_from(f[2]).ok()?));
        let dtype = dtype.copied().ok_or_else(|| {
            EngineError::Layers("the first rank did not say how its hidden states are typed".into())
        })?;
        Ok(Self { group, hidden_size: hidden_size as i32, dtype })
    }

    pub(crate) fn is_first(&self) -> bool {
        self.group.rank() == 0
    }

    pub(crate) fn is_last(&self) -> bool {
        self.group.rank() + 1 == self.group.size()
    }

    /// Hidden states `[1, positions, hidden]` of the rank before.
    pub(crate) fn receive_hidden(&self, positions: i32) -> Result<Array, GroupError> {
        self.group.recv(&[1, positions, self.hidden_size], self.dtype, self.group.rank() - 1)
    }

    /// Sends hidden states to the rank behind; done when the result has been evaluated.
    pub(crate) fn send_hidden(&self, hidden: &Array) -> Result<Array, EngineError> {
        let hidden = hidden.as_dtype(self.dtype)?;
        Ok(self.group.send(&hidden, self.group.rank() + 1)?)
    }

    /// On the first rank: what the last has drawn, `len` numbers. The two are neighbours round the ring.
    pub(crate) fn receive_report(&self, len: usize) -> Result<Array, GroupError> {
        self.group.recv(&[len as i32], Dtype::Uint32, self.group.size() - 1)
    }

    /// On the last rank: sends the report to the first; done when the result has been evaluated.
    pub(crate) fn send_report(&self, report: &Array) -> Result<Array, GroupError> {
        self.group.send(report, 0)
    }

    /// Between the first rank and the last: the drawn tokens `[rows]`, from the rank before.
    pub(crate) fn receive_tokens(&self, rows: usize) -> Result<Array, GroupError> {
        self.group.recv(&[rows as i32], Dtype::Uint32, self.group.rank() - 1)
    }

    /// Sends the drawn tokens to the rank behind, unless that is the last, which has them; done when the result has
    /// been evaluated.
    pub(crate) fn pass_on_tokens(&self, tokens: &Array) -> Result<Option<Array>, GroupError> {
        let behind = self.group.rank() + 1;
        let is_between = behind + 1 < self.group.size();
        is_between.then(|| self.group.send(tokens, behind)).transpose()
    }

    pub(crate) fn group(&self) -> &Group {
        &self.group
    }
}

fn read(array: &Array, operation: &'static str) -> Result<Vec<i32>, EngineError> {
    array.eval().map_err(|e| GroupError::collective(operation, &e))?;
    Ok(array.as_slice::<i32>().to_vec())
}
