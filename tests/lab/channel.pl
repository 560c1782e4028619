#!/usr/bin/perl
# The lab's channel: runs commands inside the lab for `lab exec`.
#
#   channel.pl agent PORT TOKEN-FILE               inside the lab, as its process 1: serve commands
#   channel.pl exec PORT TOKEN-FILE DIR CMD…       outside: run one, pass its input and output, end as it ended
#   channel.pl ping PORT TOKEN-FILE                outside: exit 0 if the agent answers
#
# Perl, because it is an essential package of Debian: it is there inside and outside before anything was built.
#
# A connection begins with the token and a newline (the port is on loopback, where others may be). Then frames in both
# directions: one byte type, four bytes length (big-endian), content.
#   to the agent:    C command (DIR and arguments, each ended by NUL)   I input   E end of input   K signal number   P ping
#   from the agent:  O standard output   R standard error   X exit status (decimal)   P pong
# A client that goes away takes its command's process group with it; what left that group (setsid) stays.
#
# Against deadlock: neither side ever waits for its peer to take input. Input is queued (and not read further while the
# queue is long), so output always flows.
use strict;
use warnings;
use IO::Select;
use IO::Socket::INET;
use POSIX qw(:sys_wait_h setsid _exit);

use constant {
    CHUNK      => 65536,      # bytes read at once
    MAX_FRAME  => 4 << 20,    # longest frame accepted
    MAX_QUEUE  => 1 << 20,    # bytes of input queued before no more is read
    LINGER_S   => 1,          # how long output may come from processes that outlive the command
    KILL_S     => 3,          # between SIGTERM and SIGKILL when the client went away
    TOKEN_WAIT => 10,         # seconds a connection may take to show its token
};

sub frame { my ($type, $data) = @_; return pack('a1 N', $type, length $data) . $data }

# Writes everything or dies, waiting where needed.
sub put {
    my ($to, $data) = @_;
    my $done = 0;
    while ($done < length $data) {
        my $n = syswrite $to, $data, length($data) - $done, $done;
        if (!defined $n) {
            next if $!{EINTR};
            if ($!{EAGAIN}) { IO::Select->new($to)->can_write(1); next }
            die "write: $!\n";
        }
        $done += $n;
    }
}

# Writes what fits now of a queue, which is shortened. Dies when the other end is gone.
sub put_some {
    my ($to, $queue) = @_;
    my $n = syswrite $to, $$queue, CHUNK;
    if (defined $n) { substr $$queue, 0, $n, '' }
    elsif (!$!{EINTR} && !$!{EAGAIN}) { die "write: $!\n" }
}

# Takes complete frames (all, or at most so many) out of the buffer.
sub frames {
    my ($buffer, $most) = @_;
    my @frames;
    while (length $$buffer >= 5 && !($most && @frames == $most)) {
        my ($type, $len) = unpack 'a1 N', $$buffer;
        die "frame of $len bytes\n" if $len > MAX_FRAME;
        last if length $$buffer < 5 + $len;
        push @frames, [$type, substr $$buffer, 5, $len];
        substr $$buffer, 0, 5 + $len, '';
    }
    return @frames;
}

sub token_of {
    my ($path) = @_;
    open my $file, '<', $path or die "can't read $path: $!\n";
    chomp(my $token = <$file> // '');
    die "$path is empty\n" if !length $token;
    return $token;
}

# ---- inside ----

sub agent {
    my ($port, $token_file) = @_;
    my $token  = token_of($token_file);
    my $listen = IO::Socket::INET->new(LocalPort => $port, Listen => 64, ReuseAddr => 1) or die "can't listen on $port: $!\n";
    $SIG{CHLD} = 'IGNORE';    # also reaps what others left behind: this is process 1
    $SIG{$_} = 'IGNORE' for qw(HUP INT TERM PIPE);
    print "lab: ready\n";
    while (1) {
        my $client = $listen->accept or next;
        my $pid = fork // next;
        next if $pid;
        close $listen;
        $SIG{$_} = 'DEFAULT' for qw(CHLD HUP INT TERM);
        eval { serve($client, $token); 1 } or print {*STDERR} "lab agent: $@";
        _exit(0);
    }
}

sub serve {
    my ($client, $token) = @_;
    my $buffer = '';
    local $SIG{ALRM} = sub { _exit(0) };
    alarm TOKEN_WAIT;
    while ($buffer !~ /\n/) {
        return if length $buffer > 256 || !sysread $client, $buffer, 256, length $buffer;
    }
    alarm 0;
    $buffer =~ s/^([^\n]*)\n//;
    return if $1 ne $token;
    while (1) {
        for my $frame (frames(\$buffer, 1)) {    # what follows the command belongs to it
            my ($type, $data) = @$frame;
            if ($type eq 'P') { put($client, frame('P', '')) }
            if ($type eq 'C') { return run($client, $buffer, split /\0/, $data, -1) }
        }
        return if !sysread $client, $buffer, CHUNK, length $buffer;
    }
}

# Starts the command; returns its process id and our ends of its three pipes.
sub spawn {
    my ($dir, @command) = @_;
    pipe my $in_r,  my $in_w  or die "pipe: $!\n";
    pipe my $out_r, my $out_w or die "pipe: $!\n";
    pipe my $err_r, my $err_w or die "pipe: $!\n";
    my $pid = fork // die "fork: $!\n";
    if (!$pid) {
        setsid();
        $SIG{PIPE} = 'DEFAULT';
        open STDIN,  '<&', $in_r;
        open STDOUT, '>&', $out_w;
        open STDERR, '>&', $err_w;
        if (!chdir $dir) { $dir = '/'; chdir $dir }
        POSIX::close($_) for 3 .. 63;
        $ENV{PWD} = $dir;
        { no warnings 'exec'; exec { $command[0] } @command; }
        my ($why, $status) = ("$!", $!{ENOENT} ? 127 : 126);
        POSIX::write(2, $_, length) for "lab: can't run $command[0]: $why\n";
        _exit($status);
    }
    return ($pid, $in_w, $out_r, $err_r);
}

sub run {
    my ($client, $buffer, $dir, @command) = @_;
    pop @command;    # what follows the last NUL
    my ($pid, $in, $out, $err) = spawn($dir, @command);
    $in->blocking(0);
    my $outputs = IO::Select->new($out, $err);
    my ($queue, $eof, $status) = ('', 0);
    while (1) {
        for my $frame (frames(\$buffer)) {
            my ($type, $data) = @$frame;
            if ($type eq 'K') { kill 0 + $data, -$pid }
            if ($type eq 'E') { $eof = 1 }
            if ($type eq 'I') { $queue .= $data if $in }
        }
        if ($in && $eof && !length $queue) { close $in; undef $in }
        last if defined $status && !$outputs->count;

        my $readers = IO::Select->new($outputs->handles);
        $readers->add($client) if length $queue < MAX_QUEUE;
        my $writers = IO::Select->new;
        $writers->add($in) if $in && length $queue;
        my $wait = defined $status ? LINGER_S : $outputs->count ? 0.25 : 0.02;
        my ($readable, $writable) = IO::Select->select($readers, $writers, undef, $wait);
        for my $from (@{ $readable // [] }) {
            my $n = sysread $from, my $data, CHUNK;
            if ($from == $client) {
                if (!$n) { return abandon($pid) }
                $buffer .= $data;
            }
            elsif (!$n) { $outputs->remove($from); close $from }
            elsif (!eval { put($client, frame($from == $out ? 'O' : 'R', $data)); 1 }) { return abandon($pid) }
        }
        # A command that closed its input ignores the rest of it.
        if (@{ $writable // [] } && !eval { put_some($in, \$queue); 1 }) { close $in; undef $in; $queue = '' }
        # Somebody else still holds the output (a daemon that was started): don't wait for it.
        last if defined $status && !@{ $readable // [] };
        if (!defined $status && waitpid($pid, WNOHANG) == $pid) {
            $status = WIFSIGNALED($?) ? 128 + WTERMSIG($?) : WEXITSTATUS($?);
        }
    }
    put($client, frame('X', $status));
}

sub abandon {
    my ($pid) = @_;
    kill 'TERM', -$pid;
    for (1 .. KILL_S * 10) {
        last if waitpid($pid, WNOHANG);
        select undef, undef, undef, 0.1;
    }
    kill 'KILL', -$pid;
}

# ---- outside ----

sub connect_to {
    my ($port, $token_file) = @_;
    my $token  = token_of($token_file);
    my $server = IO::Socket::INET->new(PeerAddr => '127.0.0.1', PeerPort => $port, Timeout => 10) or die "can't reach the lab on port $port: $!\n";
    $server->blocking(1);
    put($server, "$token\n");
    return $server;
}

sub ping {
    my $server = connect_to(@_);
    put($server, frame('P', ''));
    my $buffer = '';
    while (sysread $server, $buffer, CHUNK, length $buffer) {
        for my $frame (frames(\$buffer)) { return 0 if $frame->[0] eq 'P' }
    }
    return 1;
}

sub execute {
    my ($port, $token_file, $dir, @command) = @_;
    my $server = connect_to($port, $token_file);
    $server->blocking(0);
    my $queue = frame('C', join '', map { "$_\0" } $dir, @command);
    my $input = !-t STDIN;
    $queue .= frame('E', '') if !$input;
    my $signalled = 0;
    my %number    = (INT => 2, TERM => 15, HUP => 1);
    for my $name (keys %number) {
        my $number = $number{$name};
        $SIG{$name} = sub { exit 128 + $number if $signalled++; $queue .= frame('K', $number) };
    }
    my $buffer = '';
    while (1) {
        my $readers = IO::Select->new($server);
        $readers->add(\*STDIN) if $input && length $queue < MAX_QUEUE;
        my $writers = IO::Select->new;
        $writers->add($server) if length $queue;
        my ($readable, $writable) = IO::Select->select($readers, $writers, undef, 1);
        for my $from (@{ $readable // [] }) {
            my $n = sysread $from, my $data, CHUNK;
            next if !defined $n && ($!{EINTR} || $!{EAGAIN});
            if ($from == $server) {
                die "the lab ended the connection before the command ended\n" if !$n;
                $buffer .= $data;
            }
            elsif (!$n) { $input = 0; $queue .= frame('E', '') }
            else        { $queue .= frame('I', $data) }
        }
        for my $frame (frames(\$buffer)) {
            my ($type, $data) = @$frame;
            if ($type eq 'O') { put(\*STDOUT, $data) }
            if ($type eq 'R') { put(\*STDERR, $data) }
            if ($type eq 'X') { return $data }
        }
        # The answer may still be on its way when the agent has closed its end: reading tells.
        if (@{ $writable // [] } && !eval { put_some($server, \$queue); 1 }) { $queue = ''; $input = 0 }
    }
}

my $mode = shift // '';
$SIG{PIPE} = 'IGNORE' if $mode eq 'exec' || $mode eq 'ping';
if    ($mode eq 'agent') { agent(@ARGV) }
elsif ($mode eq 'exec')  { exit(eval { execute(@ARGV) } // do { print {*STDERR} "lab: $@"; 125 }) }
elsif ($mode eq 'ping')  { exit(eval { ping(@ARGV) } // 1) }
else                     { print {*STDERR} "usage: see the comment at the top of $0\n"; exit 2 }
