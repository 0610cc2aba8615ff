//! Sets addresses aside for a shard.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener},
};

use exo_crds::ShardListen;

/// Three addresses that nobody else gets while this lives: their sockets are bound, and closed just
/// before the runner binds them itself. In between another process may snatch one; the runner then
/// fails and the next epoch gets others.
#[derive(Debug)]
pub(crate) struct Reservation {
    transport: TcpListener,
    control: TcpListener,
    serve: TcpListener,
}

impl Reservation {
    /// Binds on `address`, at ports that the system chooses.
    pub(crate) fn new(address: IpAddr) -> io::Result<Self> {
        let bind = || TcpListener::bind(SocketAddr::new(address, 0));
        Ok(Self { transport: bind()?, control: bind()?, serve: bind()? })
    }

    pub(crate) fn listen(&self) -> io::Result<ShardListen> {
        let text = |socket: &TcpListener| socket.local_addr().map(|address| address.to_string());
        Ok(ShardListen {
            transport: text(&self.transport)?,
            control: text(&self.control)?,
            serve: text(&self.serve)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, net::Ipv4Addr};

    use super::*;

    #[test]
    fn addresses_differ_while_they_are_held_and_are_free_afterwards() {
        let held: Vec<Reservation> =
            (0..8).map(|_| Reservation::new(Ipv4Addr::LOCALHOST.into()).unwrap()).collect();
        let mut all = BTreeSet::new();
        for reservation in &held {
            let listen = reservation.listen().unwrap();
            all.extend([listen.transport, listen.control, listen.serve]);
        }
        assert_eq!(all.len(), 24);
        drop(held);
        for address in all {
            TcpListener::bind(address).unwrap();
        }
    }
}
