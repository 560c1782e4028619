//! The resolver's datagrams: an answer comes from the address that was asked.

use std::{
    io::{self, IoSlice, IoSliceMut},
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket as StdUdpSocket},
    os::fd::AsRawFd,
};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg, sendmsg};
use tokio::{io::Interest, net::UdpSocket};

/// Who asked, and whom.
#[derive(Debug, Clone, Copy)]
pub(super) struct Exchange {
    client: SocketAddr,
    /// The address that was asked; known (and needed) for IPv4, where the bridge has several.
    asked: Option<Ipv4Addr>,
}

impl Exchange {
    pub(super) fn client(&self) -> IpAddr {
        self.client.ip()
    }
}

/// A socket for one version of IP.
pub(super) struct Datagrams {
    socket: UdpSocket,
    v4: bool,
}

impl Datagrams {
    /// An IPv4 socket has IP_PKTINFO set, an IPv6 one is bound to its only address.
    pub(super) fn new(socket: StdUdpSocket) -> io::Result<Self> {
        let v4 = socket.local_addr()?.is_ipv4();
        Ok(Self { socket: UdpSocket::from_std(socket)?, v4 })
    }

    /// The next question. May be dropped at any time without losing one.
    pub(super) async fn receive(&self, buffer: &mut [u8]) -> io::Result<(usize, Exchange)> {
        if !self.v4 {
            let (length, client) = self.socket.recv_from(buffer).await?;
            return Ok((length, Exchange { client, asked: None }));
        }
        self.socket.async_io(Interest::READABLE, || receive_v4(&self.socket, buffer)).await
    }

    /// Answers, without waiting: when the device's queue is full, the client asks again.
    pub(super) fn reply(&self, to: Exchange, answer: &[u8]) -> io::Result<()> {
        let Exchange { client, asked } = to;
        match (client, asked) {
            (SocketAddr::V4(client), Some(asked)) => {
                let info = libc::in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: libc::in_addr { s_addr: u32::from(asked).to_be() },
                    ipi_addr: libc::in_addr { s_addr: 0 },
                };
                let control = [ControlMessage::Ipv4PacketInfo(&info)];
                let address = SockaddrIn::from(client);
                let parts = [IoSlice::new(answer)];
                let flags = MsgFlags::MSG_DONTWAIT;
                sendmsg(self.socket.as_raw_fd(), &parts, &control, flags, Some(&address))?;
            }
            _ => _ = self.socket.try_send_to(answer, client)?,
        }
        Ok(())
    }
}

fn receive_v4(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<(usize, Exchange)> {
    let mut control = nix::cmsg_space!(libc::in_pktinfo);
    let mut parts = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_DONTWAIT;
    let received = recvmsg::<SockaddrIn>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let client = received.address.ok_or(io::ErrorKind::InvalidData)?;
    let asked = received.cmsgs()?.find_map(|message| match message {
        ControlMessageOwned::Ipv4PacketInfo(info) => {
            Some(Ipv4Addr::from(u32::from_be(info.ipi_spec_dst.s_addr)))
        }
        _ => None,
    });
    let client = SocketAddr::V4(SocketAddrV4::from(client));
    Ok((received.bytes, Exchange { client, asked }))
}
