//! Connections to other voters. A cluster of one has none: whoever is asked is unreachable.

use std::io;

use openraft::{
    BasicNode,
    error::{InstallSnapshotError, RPCError, RaftError, Unreachable},
    network::{RPCOption, RaftNetwork, RaftNetworkFactory},
    raft::{
        AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest,
        InstallSnapshotResponse, VoteRequest, VoteResponse,
    },
};

use super::TypeConfig;

/// Makes connections.
pub(super) struct Peers;

/// One other voter.
pub(super) struct Peer {
    id: u64,
    address: String,
}

type Result<T, E = RaftError<u64>> = std::result::Result<T, RPCError<u64, BasicNode, E>>;

impl Peer {
    fn unreachable(&self) -> Unreachable {
        Unreachable::new(&io::Error::other(format!(
            "no route to voter {} at {}: this store runs as a single voter",
            self.id, self.address
        )))
    }
}

impl RaftNetworkFactory<TypeConfig> for Peers {
    type Network = Peer;

    async fn new_client(&mut self, id: u64, node: &BasicNode) -> Peer {
        Peer { id, address: node.addr.clone() }
    }
}

impl RaftNetwork<TypeConfig> for Peer {
    async fn append_entries(
        &mut self,
        _: AppendEntriesRequest<TypeConfig>,
        _: RPCOption,
    ) -> Result<AppendEntriesResponse<u64>> {
        Err(self.unreachable().into())
    }

    async fn install_snapshot(
        &mut self,
        _: InstallSnapshotRequest<TypeConfig>,
        _: RPCOption,
    ) -> Result<InstallSnapshotResponse<u64>, RaftError<u64, InstallSnapshotError>> {
        Err(self.unreachable().into())
    }

    async fn vote(&mut self, _: VoteRequest<u64>, _: RPCOption) -> Result<VoteResponse<u64>> {
        Err(self.unreachable().into())
    }
}
